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

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from dyndet.errors import UserError

_FILE = "job.json"
_NOT_RESULTS = ("again", "objective", "output_dir")
"""Keys that change where a job writes or what it reports, but nothing of what it computes."""


def run_job(task: Callable[[DictConfig], Any], config: DictConfig, folder: Path, overrides: list[str],
            explain: Callable[[Exception], str | None]) -> Any:  # fmt: skip
    """Runs a sweep's job; a failure is written down, so that the jobs after it run.

    Where the configuration has `again` and it is false, a job that an earlier sweep of this name has done, of the
    same resolved configuration, is not repeated.

    Args:
        task: of the command.
        config: of the job.
        folder: of the job.
        overrides: what the job's command line sets.
        explain: an exception in one line; None where it is no mistake of the user, and its traceback is shown.

    Returns:
        What the task returns; with `objective` the number or numbers it names, nan for a job that failed.
    """
    objective = config.get("objective")
    record: dict[str, Any] = {"status": "running", "overrides": overrides}
    try:
        record["fingerprint"] = fingerprint(config, getattr(task, "__name__", ""))
        earlier = None if config.get("again", True) else _done(folder, record["fingerprint"])
        if earlier is not None:
            print(f"job {folder.name} is done: {_short(earlier)} (again=true repeats it)")
            metrics = json.loads((earlier / _FILE).read_text())["metrics"]
            if earlier.resolve() != folder.resolve():
                _write(folder, record | {"status": "skipped", "metrics": metrics, "done_in": str(earlier)})
                shutil.rmtree(folder / ".hydra", ignore_errors=True)  # so that reports do not count it twice
            return _value(metrics, objective)
        _write(folder, record)
        result = task(config)
        metrics = {key: float(value) for key, value in result.items()} if isinstance(result, Mapping) else {}
        value = result if objective is None else _value(metrics, objective)
        finite = {key: number for key, number in metrics.items() if math.isfinite(number)}  # json has no nan
        _write(folder, record | {"status": "done", "metrics": finite})
        return value
    except Exception as error:
        message = explain(error)
        if message is None:
            traceback.print_exc()
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"error: job {folder.name}: {message}", file=sys.stderr, flush=True)
        _write(folder, record | {"status": "failed", "error": message})
        return None if objective is None else _value({}, objective, missing=math.nan)


def fingerprint(config: DictConfig, task: str) -> str:
    """Of what a job computes: its task and its resolved configuration, wherever it writes."""
    plain = OmegaConf.masked_copy(config, [str(key) for key in config if key not in _NOT_RESULTS])
    for key in _NOT_RESULTS:
        OmegaConf.update(plain, key, "", force_add=True)  # what refers to it is the same for all
    values = OmegaConf.to_container(plain, resolve=True)
    return hashlib.sha256(json.dumps([task, values], sort_keys=True, default=str).encode()).hexdigest()


def close_sweep(folder: Path) -> None:
    """Prints what became of a sweep's jobs; exits with 1 if any failed."""
    jobs = {path.parent: json.loads(path.read_text()) for path in folder.glob(f"*/{_FILE}")}
    if not jobs:
        return
    shared = set.intersection(*(set(job["overrides"]) for job in jobs.values()))
    table = Table("job", "what differs", "status", "AP", "folder")
    problems = []
    for path, job in sorted(jobs.items(), key=lambda item: (len(item[0].name), item[0].name)):
        if job["status"] == "running":  # its process is gone
            job |= {"status": "failed", "error": "it ended without a word: killed, or out of memory"}
        ap = job.get("metrics", {}).get("val/AP")
        differing = " ".join(item for item in job["overrides"] if item not in shared)
        where = _short(Path(job.get("done_in", path)))
        table.add_row(path.name, differing, job["status"], "-" if ap is None else f"{ap:.3f}", where)
        if job["status"] == "failed":
            problems.append(f"job {path.name}: {job['error']}")
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    for line in problems:
        print(line)
    if problems:
        print(f"{len(problems)} of {len(jobs)} jobs failed; the same command runs these again and no others")
        raise SystemExit(1)


def _short(folder: Path) -> str:
    return os.path.relpath(folder) if folder.resolve().is_relative_to(Path.cwd()) else str(folder)


def _done(folder: Path, wanted: str) -> Path | None:
    """Folder of a job with this fingerprint, in this sweep's folder or in those beside it."""
    for path in sorted(folder.parents[1].glob(f"*/*/{_FILE}"), reverse=True):
        try:
            job = json.loads(path.read_text())
        except (OSError, ValueError):  # just being written, or damaged
            continue
        if job.get("status") == "done" and job.get("fingerprint") == wanted:
            return path.parent
    return None


def _value(metrics: Mapping[str, float], objective: Any, missing: float | None = None) -> Any:
    """The number that `objective` names, or a tuple of the numbers that it lists."""
    if objective is None:
        return dict(metrics)
    names = [objective] if isinstance(objective, str) else list(objective)
    for name in names:
        if name not in metrics and missing is None:
            known = ", ".join(sorted(key for key in metrics if not key.startswith("train/")))
            raise UserError(f"objective={name}: no such number among those of this run: {known}")
    values = tuple(metrics.get(name, missing) for name in names)
    return values[0] if isinstance(objective, str) else values


def _write(folder: Path, record: dict[str, Any]) -> None:
    """At once, so that nobody reads half of it."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{_FILE}.{os.getpid()}"
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(folder / _FILE)
