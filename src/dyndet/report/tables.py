"""Runs as a table and as a picture of accuracy against executed compute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from dyndet.report.runs import Group, Run, group_by_seed

COLUMNS = {
    "val/AP": ("AP", 1.0, ".3f"),
    "val/AP50": ("AP50", 1.0, ".3f"),
    "macs/head_used_mean": ("head GMAC", 1e-9, ".3f"),
    "macs/head_ratio": ("of full", 100.0, ".1f"),
    "macs/total_mean": ("total GMAC", 1e-9, ".3f"),
}
"""Metric -> heading, factor, format."""

AXES = {
    "macs/head_ratio": "executed share of the head's multiply-adds",
    "macs/head_used_mean": "multiply-adds executed by the head, per image",
    "macs/total_mean": "multiply-adds executed in all, per image",
    "val/AP": "AP (COCO)",
    "val/AP50": "AP50",
}


def report_table(runs: Sequence[Run], *, x: str = "macs/head_ratio", y: str = "val/AP") -> str:
    """A markdown table, one row per setting (mean and standard deviation over its seeds), least compute first.

    Args:
        runs: unfinished ones are listed below the table.
        x: the metric to sort by.
        y: shown even when it is none of the usual columns.
    """
    columns = dict(COLUMNS)
    for metric in (x, y):
        columns.setdefault(metric, (metric, 1.0, ".4g"))
    groups = sorted(group_by_seed(runs), key=lambda group: group.mean(x))
    rows = [["run", "seeds", *(heading for heading, _, _ in columns.values())]]
    rows += [
        [group.label, str(len(group.runs)), *(_cell(group, metric, *how[1:]) for metric, how in columns.items())]
        for group in groups
    ]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    unfinished = [str(run.folder) for run in runs if not run.finished]
    if unfinished:
        lines += ["", f"Without a validation: {', '.join(unfinished)}"]
    return "\n".join(lines)


def pareto_plot(runs: Sequence[Run], path: Path, *, x: str = "macs/head_ratio", y: str = "val/AP") -> Path:
    """Draws y against x: a point per setting, its spread over seeds, and a line through what nothing dominates."""
    groups = sorted(group_by_seed(runs), key=lambda group: group.mean(x))
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    front = pareto_front([(group.mean(x), group.mean(y)) for group in groups])
    axes.plot(*zip(*front, strict=True), color="0.75", zorder=1) if front else None
    for group in groups:
        at = group.mean(x), group.mean(y)
        axes.errorbar(*at, xerr=group.spread(x), yerr=group.spread(y), fmt="o", capsize=3, zorder=2)
        axes.annotate(group.label, at, textcoords="offset points", xytext=(6, 6), fontsize=8)
    axes.set_xlabel(AXES.get(x, x))
    axes.set_ylabel(AXES.get(y, y))
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return path


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats with less x and at least as much y, by ascending x."""
    front: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front


def _cell(group: Group, metric: str, factor: float, form: str) -> str:
    mean, spread = group.mean(metric) * factor, group.spread(metric) * factor
    return f"{mean:{form}} ± {spread:{form}}" if len(group.runs) > 1 else f"{mean:{form}}"
