"""Finished runs, read back from their folders."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from dyndet.errors import UserError


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        folder: where it was written.
        overrides: what its command line set, key -> value.
        metrics: its last validation; empty if it never got that far.
    """

    folder: Path
    overrides: dict[str, str]
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return bool(self.metrics)


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed.

    Attributes:
        label: what sets the group apart from the others, e.g. "budget.weight=0.1".
        runs: at least one, all finished.
    """

    label: str
    runs: list[Run]

    def mean(self, metric: str) -> float:
        """Over the seeds; nan where a run lacks the metric."""
        return statistics.fmean(run.metrics.get(metric, math.nan) for run in self.runs)

    def spread(self, metric: str) -> float:
        """Standard deviation over the seeds; 0 for one."""
        values = [run.metrics.get(metric, math.nan) for run in self.runs]
        if any(math.isnan(value) for value in values):
            return math.nan
        return statistics.stdev(values) if len(values) > 1 else 0.0


def collect_runs(folder: str | Path) -> list[Run]:
    """Every run at or below a folder, in the order of their paths (numbers by value).

    Raises:
        UserError: if there is none.
    """
    root = Path(folder)
    found = sorted(root.rglob(".hydra/overrides.yaml"), key=lambda path: _natural(path.relative_to(root)))
    if not found:
        raise UserError(f"runs={root}: no runs below this folder; give the folder of a multirun or of several runs")
    return [Run(path.parent.parent, _overrides(path), _metrics(path.parent.parent)) for path in found]


def group_by_seed(runs: Sequence[Run]) -> list[Group]:
    """Finished runs, those that differ only in their seed together, labelled by what the groups do not share."""
    groups: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        if run.finished:
            key = tuple(sorted((k, v) for k, v in run.overrides.items() if k not in _UNTOLD))
            groups.setdefault(key, []).append(run)
    shared = set.intersection(*(set(key) for key in groups)) if len(groups) > 1 else set()
    return [
        Group(" ".join(f"{k}={v}" for k, v in key if (k, v) not in shared) or members[0].folder.name, members)
        for key, members in groups.items()
    ]


_UNTOLD = {"seed", "hydra.run.dir", "ckpt_path"}
"""Keys that say nothing about what was trained."""


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.parts]


def _overrides(path: Path) -> dict[str, str]:
    lines = yaml.safe_load(path.read_text()) or []
    pairs = (str(line).lstrip("+").partition("=") for line in lines if not str(line).startswith("~"))
    return {key: value for key, _, value in pairs}


def _metrics(folder: Path) -> dict[str, float]:
    """`result.json`, else the last validation row of the newest `metrics.csv`."""
    result = folder / "result.json"
    if result.is_file():
        try:
            return {key: float(value) for key, value in json.loads(result.read_text()).items()}
        except (ValueError, AttributeError, TypeError):
            return {}  # the run was ended while it wrote
    tables = sorted(folder.rglob("metrics.csv"), key=lambda path: path.stat().st_mtime)
    rows = list(csv.DictReader(tables[-1].read_text().splitlines())) if tables else []
    validated = [row for row in rows if row.get("val/AP")]
    return {key: float(value) for key, value in validated[-1].items() if value} if validated else {}
