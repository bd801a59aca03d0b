"""Jobs of a sweep: what became of each stands in a file of its folder, which other processes and later sweeps read."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dyndet import __version__
from dyndet.cli.named_files import named_files
from dyndet.errors import UserError

_FILE = "job.json"
_NOT_RESULTS = ("again", "objective", "output_dir")
"""Keys that change where a job writes or what it reports, but nothing of what it computes."""


def run_job(task: Callable[[DictConfig], Any], config: DictConfig, folder: Path, sweep: Path, overrides: list[str],
            explain: Callable[[Exception], str | None]) -> Any:  # fmt: skip
    """Runs a sweep's job; a failure is written down, so that the jobs after it run.

    Where the configuration has `again` and it is false, a job that an earlier sweep of this name has done, of the
    same resolved configuration, is not repeated.

    Args:
        task: of the command.
        config: of the job.
        folder: of the job.
        sweep: folder of the sweep, in which that of the job lies.
        overrides: what the job's command line sets.
        explain: an exception in one line; None where it is no mistake of the user, and its traceback is shown.

    Returns:
        What the task returns; with `objective` the number or numbers it names, nan where there is none.
    """
    objective = config.get("objective")
    record: dict[str, Any] = {"status": "running", "overrides": overrides}
    try:
        _names(objective)
        record["fingerprint"] = fingerprint(config, getattr(task, "__name__", ""))
        earlier = None if config.get("again", True) else _done(folder, sweep, record["fingerprint"])
        if earlier is not None:
            print(f"job {folder.name} is done: {_short(earlier)} (again=true repeats it)")
            kept = {key: value for key, value in _read(earlier / _FILE).items() if key in ("metrics", "undefined")}
            if earlier.resolve() == folder.resolve():
                record = _read(folder / _FILE)
                record.pop("error", None)  # of another objective
            else:
                record |= {"status": "skipped", "done_in": str(earlier)} | kept
                shutil.rmtree(folder / ".hydra", ignore_errors=True)  # so that reports do not count it twice
            _write(folder, record)
            result: Any = kept["metrics"] | dict.fromkeys(kept.get("undefined", ()), math.nan)
        else:
            _write(folder, record)
            result = task(config)
            numbers = {key: float(value) for key, value in result.items()} if isinstance(result, Mapping) else {}
            finite = {key: number for key, number in numbers.items() if math.isfinite(number)}  # json has no nan
            record |= {"status": "done", "metrics": finite, "undefined": sorted(numbers.keys() - finite.keys())}
            _write(folder, record)
        return result if objective is None else _value(result, objective)
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit):
            if error.code in (130, 143):  # interrupted, or ended by a scheduler: so is the sweep
                raise
            message = error.code if isinstance(error.code, str) else f"it ended with exit code {error.code}, see above"
        elif (message := explain(error)) is None:
            traceback.print_exc()
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"error: job {folder.name}: {message}", file=sys.stderr, flush=True)
        done = record["status"] in ("done", "skipped")  # without what a sweeper wants of it
        _write(folder, record | {"status": record["status"] if done else "failed", "error": message})
        several = isinstance(objective, list | ListConfig)
        return None if objective is None else (math.nan,) * len(objective) if several else math.nan


def fingerprint(config: DictConfig, task: str) -> str:
    """Of what a job computes: its task, its resolved configuration, wherever it writes, and the files that this names.

    Of files the size and the time of their last change count. Of a data set's folder these are its annotations.
    """
    plain = OmegaConf.masked_copy(config, [str(key) for key in config if key not in _NOT_RESULTS])
    for key in _NOT_RESULTS:
        OmegaConf.update(plain, key, "", force_add=True)  # what refers to it is the same for all
    values: Any = OmegaConf.to_container(plain, resolve=True)
    content = [__version__, task, values, named_files(values)]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def close_sweep(folder: Path, *, stale: Mapping[Path, int] | None = None, repeats: bool = False) -> None:
    """Prints what became of a sweep's jobs; exits with 1 if any failed, or none has begun.

    Args:
        folder: of the sweep.
        stale: what `job_files` said before the sweep: what has not been written since is of another one.
        repeats: whether jobs that are done are not repeated.
    """
    files = [path for path, time in job_files(folder).items() if (stale or {}).get(path) != time]
    jobs = {path.parent.relative_to(folder).as_posix(): _read(path) for path in files}
    if not jobs:
        print(f"error: no job of this sweep left a {_FILE} below {folder}", file=sys.stderr)
        raise SystemExit(1)
    shared = set.intersection(*(set(job["overrides"]) for job in jobs.values()))
    table = Table("job", "what differs", "status", "AP", "folder")
    problems = []
    for name, job in sorted(jobs.items(), key=lambda item: (len(item[0]), item[0])):
        if job["status"] == "running":  # its process is gone
            job |= {"status": "failed", "error": "it ended without a word: killed, or out of memory"}
        ap = job.get("metrics", {}).get("val/AP")
        differing = " ".join(item for item in job["overrides"] if item not in shared)
        where = _short(Path(job.get("done_in", folder / name)))
        cells = (name, differing, job["status"], "-" if ap is None else f"{ap:.3f}", where)
        table.add_row(*map(escape, cells))
        if "error" in job:
            problems.append(f"job {name}: {job['error']}")
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    for line in problems:
        print(line)
    failed = sum(job["status"] == "failed" for job in jobs.values())
    if failed:
        more = "; the same command runs these again and no others" if repeats else ""
        print(f"{failed} of {len(jobs)} jobs failed{more}")
    if problems:
        raise SystemExit(1)


def job_files(folder: Path) -> dict[Path, int]:
    """Files of the jobs of a sweep, with the times when they were written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob(_FILE)}


def _short(folder: Path) -> str:
    return os.path.relpath(folder) if folder.resolve().is_relative_to(Path.cwd()) else str(folder)


def _done(folder: Path, sweep: Path, wanted: str) -> Path | None:
    """Folder of a job with this fingerprint, in this sweep's folder or in those beside it."""
    inside = folder.relative_to(sweep).parts if folder.is_relative_to(sweep) else (folder.name,)
    for path in sorted(sweep.parent.glob("/".join(["*", *("*" for _ in inside), _FILE])), reverse=True):
        job = _read(path)
        if job["status"] == "done" and job.get("fingerprint") == wanted:
            return path.parent
    return None


def _read(path: Path) -> dict[str, Any]:
    """What a job's file says; as of a failed job where it cannot be read."""
    try:
        job = json.loads(path.read_text())
        return job | {"status": job["status"], "overrides": job["overrides"]}
    except (OSError, ValueError, LookupError, TypeError):
        return {"status": "failed", "overrides": [], "error": f"{path} cannot be read"}


def _names(objective: Any) -> list[str]:
    names = [] if objective is None else [objective] if isinstance(objective, str) else objective
    if not isinstance(names, list | ListConfig) or not all(isinstance(name, str) for name in names):
        raise UserError(f"objective={objective}: give the name of a number, or a list of names as [val/AP,val/AP50]")
    return list(names)


def _value(metrics: Mapping[str, float], objective: Any) -> Any:
    """The number that `objective` names, or a tuple of the numbers that it lists."""
    names = _names(objective)
    for name in names:
        if name not in metrics:
            known = ", ".join(sorted(key for key in metrics if not key.startswith("train/")))
            raise UserError(f"objective={name}: no such number among those of this run: {known}")
    values = tuple(metrics[name] for name in names)
    return values[0] if isinstance(objective, str) else values


def _write(folder: Path, record: dict[str, Any]) -> None:
    """At once, so that nobody reads half of it."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{_FILE}.{os.getpid()}"
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(folder / _FILE)
