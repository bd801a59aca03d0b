"""Finished, unfinished and broken runs below a folder, and what sets them apart."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dyndet.errors import UserError


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        folder: of the run.
        settings: its overrides, key to value as written on the command line (without + and ~).
        metrics: the numbers of its last validation, without those that are not defined (nan).
        problem: why the numbers are missing or not final; "" for a finished run.
    """

    folder: Path
    settings: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Group:
    """Runs with the same settings but for the seed."""

    settings: dict[str, str]
    runs: list[Run]

    @property
    def problem(self) -> str:
        return self.runs[0].problem

    def mean(self, key: str) -> float:
        """Mean over the runs that have the number; nan when none has."""
        values = self._values(key)
        return statistics.fmean(values) if values else math.nan

    def std(self, key: str) -> float:
        """Sample standard deviation (n - 1) over the runs; nan below two."""
        values = self._values(key)
        return statistics.stdev(values) if len(values) > 1 else math.nan

    def _values(self, key: str) -> list[float]:
        return [run.metrics[key] for run in self.runs if key in run.metrics]


def collect_runs(folder: str | Path) -> list[Run]:
    """The runs at or below a folder (of a Hydra multirun, say), in natural order of their names.

    A run is a folder with `.hydra`, or without one with a `result.json`. Numbers come from its `result.json`, else from
    the last validation in its newest `metrics.csv`. Runs without usable numbers are listed with their problem.

    Raises:
        UserError: if there is no such folder, or no run in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder of a multirun, or any folder with runs below it")
    homes = {path.parent for path in folder.rglob(".hydra") if path.is_dir()}
    results = [path.parent for path in folder.rglob("result.json")]
    homes |= {path for path in results if not any(parent in homes for parent in (path, *path.parents))}
    if not homes:
        raise UserError(f"no runs below {folder}: a run has a .hydra folder or a result.json")
    return [_read_run(home, folder, homes) for home in sorted(homes, key=lambda home: _natural(home, folder))]


def group_runs(runs: Iterable[Run], *, ignore: Sequence[str] = ("seed",)) -> list[Group]:
    """Finished runs that differ in nothing but `ignore`, together; a run with a problem stays alone."""
    groups: dict[tuple[object, ...], Group] = {}
    for run in runs:
        settings = {key: value for key, value in run.settings.items() if key not in ignore}
        key = (*sorted(settings.items()), run.folder if run.problem else None)
        groups.setdefault(key, Group(settings, [])).runs.append(run)
    return list(groups.values())


def compute_number(runs: Iterable[Run]) -> str:
    """What compute is compared by: the executed share of the head where gates save any, else all MACs."""
    gated = any(run.metrics.get("macs/head_ratio", 1.0) < 1 for run in runs)
    return "macs/head_ratio" if gated else "macs/total_mean"


def differences(groups: Sequence[Group]) -> list[str]:
    """The settings in which the groups differ, in the order in which they first appear."""
    keys = dict.fromkeys(key for group in groups for key in group.settings)
    return [key for key in keys if len({group.settings.get(key) for group in groups}) > 1]


def logs_of(home: Path, homes: set[Path]) -> list[Path]:
    """The `metrics.csv` of a run, newest first, without those of other runs that lie in its folder."""
    mine = [path for path in home.rglob("metrics.csv") if _owner(path, homes) == home]
    return sorted(mine, key=lambda path: (path.stat().st_mtime, _natural(path, home)), reverse=True)


def _read_run(home: Path, root: Path, homes: set[Path]) -> Run:
    try:
        overrides = home / ".hydra" / "overrides.yaml"
        if overrides.is_file():
            settings = _settings(_yaml(overrides))
        else:
            settings = {"folder": str(home.relative_to(root)) if home != root else home.name}
    except Exception as error:  # whatever a half-written file brings
        return Run(home, problem=f"overrides.yaml cannot be read ({_brief(error)})")
    try:
        metrics = {key: value for key, value in _metrics(home, homes).items() if math.isfinite(value)}
    except Exception as error:
        return Run(home, settings, problem=f"numbers cannot be read ({_brief(error)})")
    if not metrics:
        return Run(home, settings, problem="no validation yet")
    return Run(home, settings, metrics, _unfinished(home, metrics))


def _metrics(home: Path, homes: set[Path]) -> dict[str, float]:
    if (home / "result.json").is_file():
        result = json.loads((home / "result.json").read_text(encoding="utf-8"))
        return {key: float(value) for key, value in result.items() if _is_number(value)}
    for path in logs_of(home, homes):
        metrics = _last_validation(path)
        if metrics:
            return metrics
    return {}


def _last_validation(path: Path) -> dict[str, float]:
    """The last row with a `val/` number, with whatever other rows of the same step add."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [_numbers(row) for row in csv.DictReader(file)]
    validations = [row for row in rows if any(key.startswith("val/") for key in row)]
    if not validations:
        return {}
    last = validations[-1]
    merged: dict[str, float] = {}
    for row in rows:
        if "step" in row and row["step"] == last.get("step"):
            merged |= row
    return merged | last


def _unfinished(home: Path, metrics: dict[str, float]) -> str:
    """Compares the last validation with the length of training that the configuration asked for."""
    path = home / ".hydra" / "config.yaml"
    if "epoch" not in metrics or not path.is_file():
        return ""
    try:
        config = _yaml(path)
    except Exception as error:
        return f"config.yaml cannot be read ({_brief(error)})"
    trainer = config.get("trainer") if isinstance(config, dict) else None
    if not isinstance(trainer, dict):
        return ""
    epochs, steps = trainer.get("max_epochs"), trainer.get("max_steps")
    every = trainer.get("check_val_every_n_epoch")
    done = int(metrics["epoch"]) + (every if isinstance(every, int) else 1)
    last = steps if isinstance(steps, int) and steps > 0 else None
    if last is not None and last <= metrics.get("step", 0) + 1:
        return ""
    if not isinstance(epochs, int) or epochs < 0:
        return "" if last is None else f"unfinished: step {int(metrics.get('step', 0))} of {last}"
    if done >= epochs:
        return ""
    return f"unfinished: epoch {int(metrics['epoch']) + 1} of {epochs}"


def _settings(overrides: Any) -> dict[str, str]:
    pairs = (str(item).lstrip("+").partition("=") for item in overrides or [])
    # A deletion "~key" is a setting of its own.
    return {key: value if sign else "" for key, sign, value in pairs}


def _yaml(path: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(path), resolve=False)


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in row.items() if key and value not in (None, "")}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _owner(path: Path, homes: set[Path]) -> Path | None:
    """The innermost run that a file lies in."""
    return next((parent for parent in path.parents if parent in homes), None)


def _natural(path: Path, root: Path) -> list[tuple[int, int, str]]:
    """Sorts 2 before 10."""
    parts = path.relative_to(root).parts
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def _brief(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:80]
