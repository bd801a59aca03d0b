"""How the numbers of a run went over its steps, from the CSV logger's files."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from pathlib import Path

from dyndet.report.charts import Line
from dyndet.report.runs import logs_of

History = dict[str, dict[int, float]]
"""Logged name to step to value."""

POINTS = 200
"""More points of a line are averaged in neighbours."""


def read_history(home: Path, homes: Iterable[Path]) -> History:
    """Every number that was logged; of a resumed run what its last file says of a step. Broken lines are left out.

    Args:
        home: folder of the run.
        homes: folders of all runs: what lies in another run's is not of this one.
    """
    history: History = {}
    for path in reversed(logs_of(home, set(homes))):
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(file):
                step = _value(row.pop("step", None))
                values = {key: _value(text) for key, text in row.items() if key and isinstance(text, str | None)}
                for key, value in values.items():
                    if step is not None and value is not None:
                        history.setdefault(key, {})[int(step)] = value
    return history


def line_of(history: History, key: str, name: str | None = None) -> Line:
    """A logged number as a line over steps."""
    steps = sorted(history.get(key, {}))
    group = math.ceil(len(steps) / POINTS) if steps else 1
    groups = [steps[start : start + group] for start in range(0, len(steps), group)]
    values = [sum(history[key][step] for step in part) / len(part) for part in groups]
    return Line(name or key, [sum(part) / len(part) for part in groups], values)


def _value(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
