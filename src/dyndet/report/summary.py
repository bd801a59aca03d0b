"""The last lines of a run: accuracy next to executed compute."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.table import Table

from dyndet.metrics.compute import ComputeReport


def print_summary(
    report: ComputeReport, metrics: Mapping[str, float], folder: Path | None = None, stream: TextIO | None = None
) -> None:
    """Prints AP, executed multiply-adds (the paper's Table 1) and densities per level.

    Args:
        report: compute over the validation images.
        metrics: scalars under their logged names (`val/AP`, ...).
        folder: the run's folder, to be named at the end.
        stream: where to print; standard output by default.
    """
    console = Console(file=stream or sys.stdout, width=100)
    if report.open:
        console.print(_densities(report))
        dead = ", ".join(report.gate_name(key) for key in report.dead)
        console.print(f"gates that never opened: {dead or 'none'}", highlight=False)
    for what, prefix in (("accuracy", "val/"), ("of masks", "val/segm/")):
        names = [name for name in ("AP", "AP50", "AP75", "APs", "APm", "APl") if prefix + name in metrics]
        if names or what == "accuracy":
            overall = [f"{name} {metrics[prefix + name]:.3f}" for name in names]
            console.print(f"{what}   " + "   ".join(overall), highlight=False)
    table = Table("GMAC per image (1 MAC = 1 multiply-add)", "mean", "max", "min")
    for row in report.as_table():
        table.add_row(*row.values())
    console.print(table)
    if report.full.mean > 0:  # a head may do nothing
        console.print(
            f"head: {report.ratio:.1%} of its full {report.full.mean / 1e9:.3f} GMAC used, mean of "
            f"{report.images} images",
            highlight=False,
        )
    if report.hard is not None:
        console.print(f"routes: {report.hard:.1%} of the images took the hard route", highlight=False)
    if report.open and report.executed > 0:  # heads of one's own may not say
        console.print(
            f"gated convolutions: {report.asked / 1e9:.3f} GMAC asked for, {report.executed / 1e9:.3f} computed, tiles "
            "and dense runs included",
            highlight=False,
        )
    if folder is not None:
        console.print(f"run folder: {folder}", markup=False, highlight=False)


def _densities(report: ComputeReport) -> Table:
    """Open share of every gate, a row per node and path, a column per level."""
    levels = sorted({level for _, _, level in report.open})
    names = [report.level_names[level] if level < len(report.level_names) else f"L{level}" for level in levels]
    table = Table("open gates", *names)
    for node, path in dict.fromkeys((node, path) for node, path, _ in report.open):
        shares = [report.open.get((node, path, level)) for level in levels]
        table.add_row(f"{node}.{path}", *("-" if share is None else f"{share:.1%}" for share in shares))
    return table
