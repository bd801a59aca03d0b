"""The table of what routers gain."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import plot_speed  # type: ignore[import-not-found]
import pytest

from dyndet.speeds.splits import Split


def curve(*aps: float) -> list[Split]:
    """From all easy at 1 GMAC to all hard at 2 GMAC."""
    last = len(aps) - 1
    ends = {0: -math.inf, last: math.inf}
    return [Split(i / last, ends.get(i, float(i)), (1 + i / last) * 1e9, ap, ap) for i, ap in enumerate(aps)]


def test_the_table_tells_the_gain_over_the_straight_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for number, middle in enumerate((0.35, 0.37)):
        files.append(tmp_path / f"{number}.json")
        rows = [row | {"threshold": str(row["threshold"])} for row in map(asdict, curve(0.2, middle, 0.4))]
        files[-1].write_text(json.dumps({"splits": rows, "spearman": 0.5 + number / 10}))
    plot_speed.main([str(tmp_path / "curve.png"), f"median={files[0]},{files[1]}", f"one={files[0]}"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == "| 50% | 1.500 | 0.3000 | +0.0600 ± 0.0141 | +0.0500 |"
    assert lines[5] == "| Spearman | | | +0.55 ± 0.07 | +0.50 |"
    with pytest.raises(SystemExit):
        plot_speed.main(["curve.png"])
