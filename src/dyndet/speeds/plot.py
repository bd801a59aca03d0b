"""One dynamic detector at every speed: AP against multiply-adds, with the straight line between its two ends."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dyndet.report.tables import BLUE, GREY, INK, ORANGE
from dyndet.speeds.splits import Split

COLORS = (BLUE, ORANGE, GREY, "#0f766e")


def speed_plot(curves: Mapping[str, Sequence[Sequence[Split]]], path: str | Path) -> Path:
    """Draws AP of every share of hard images as a png.

    The straight line is what sending images at random would give. Routers are compared by how far they lie above it.

    Args:
        curves: by the name of a router, its splits over several seeds, each from all easy to all hard; means are drawn.
        path: of the picture.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ends: list[tuple[float, float]] = []
    for index, (name, seeds) in enumerate(curves.items()):
        points = mean_curve(seeds)
        ends = [points[0], points[-1]]
        axes.plot(*zip(*points, strict=True), color=COLORS[index % len(COLORS)], marker="o", ms=4, lw=1.6, label=name)
    axes.plot(*zip(*ends, strict=True), color=INK, lw=1, ls="--", zorder=1, label="straight line between the ends")
    axes.set_xlabel("GMAC per image")
    axes.set_ylabel("AP")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def mean_curve(seeds: Sequence[Sequence[Split]]) -> list[tuple[float, float]]:
    """(GMAC, AP) of every split, means over the seeds."""
    return [
        (statistics.fmean(split.macs for split in same) / 1e9, statistics.fmean(split.ap for split in same))
        for same in zip(*seeds, strict=True)
    ]
