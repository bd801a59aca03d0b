"""Pictures and tables of what routers gain."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from PIL import Image

from dyndet.speeds.plot import mean_curve, speed_plot
from dyndet.speeds.splits import Split


def curve(*aps: float) -> list[Split]:
    """From all easy at 1 GMAC to all hard at 2 GMAC."""
    last = len(aps) - 1
    ends = {0: -math.inf, last: math.inf}
    return [Split(i / last, ends.get(i, float(i)), (1 + i / last) * 1e9, ap, ap) for i, ap in enumerate(aps)]


def test_the_mean_curve_is_of_all_seeds() -> None:
    points = mean_curve([curve(0.2, 0.3, 0.4), curve(0.4, 0.5, 0.4)])
    assert points == [pytest.approx(point) for point in ((1.0, 0.3), (1.5, 0.4), (2.0, 0.4))]


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    path = speed_plot({"median": [curve(0.2, 0.35, 0.4)], "zero": [curve(0.2, 0.3, 0.4)]}, tmp_path / "a" / "b.png")
    colours = {pixel for _, pixel in Image.open(path).convert("RGB").getcolors(1 << 24) or []}
    assert {(0x2B, 0x6C, 0xB0), (0xD9, 0x62, 0x2B)} <= colours  # a line each
