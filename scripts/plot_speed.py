"""Several routers in one picture and one table: `python scripts/plot_speed.py OUT.png NAME=calibration.json,... ...`.

Every NAME takes the files of its seeds, written by `python -m dyndet.calibrate`. The table goes to standard output: by
how much AP lies above the straight line between the two ends, which is what sending images at random would give.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyndet.speeds.plot import speed_plot
from dyndet.speeds.splits import Split


def main(arguments: Sequence[str]) -> None:
    """Draws, and prints what each router gains at every share of hard images, then its rank correlations."""
    if len(arguments) < 2 or any("=" not in item for item in arguments[1:]):
        raise SystemExit(__doc__)
    curves: dict[str, list[list[Split]]] = {}
    correlations: dict[str, list[float]] = {}
    for item in arguments[1:]:
        name, _, files = item.partition("=")
        reports = [json.loads(Path(file).read_text()) for file in files.split(",")]
        curves[name] = [[_split(row) for row in report["splits"]] for report in reports]
        correlations[name] = [report["spearman"] for report in reports]
    print("| hard | GMAC | straight line | " + " | ".join(curves) + " |")
    print("| --: " * (3 + len(curves)) + "|")
    some = next(iter(curves.values()))
    for index, split in enumerate(some[0]):
        gains = [[seed[index].ap - _straight(seed, index) for seed in seeds] for seeds in curves.values()]
        line = statistics.fmean(_straight(seed, index) for seed in some)
        macs = statistics.fmean(seed[index].macs for seed in some) / 1e9
        cells = [f"{split.fraction:.0%}", f"{macs:.3f}", f"{line:.4f}", *map(_spread, gains)]
        print("| " + " | ".join(cells) + " |")
    print("| Spearman | | | " + " | ".join(_spread(values, 2) for values in correlations.values()) + " |")
    print(f"picture: {speed_plot(curves, arguments[0])}")


def _split(row: dict[str, Any]) -> Split:
    """Json has no infinities: they are words there."""
    return Split(**{**row, "threshold": float(row["threshold"])})


def _straight(splits: Sequence[Split], index: int) -> float:
    """AP on the line between the ends, at the cost of this split."""
    easy, hard = splits[0], splits[-1]
    return easy.ap + (hard.ap - easy.ap) * (splits[index].macs - easy.macs) / (hard.macs - easy.macs)


def _spread(values: Sequence[float], digits: int = 4) -> str:
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return f"{statistics.fmean(values):+.{digits}f}"
    return f"{statistics.fmean(values):+.{digits}f} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    main(sys.argv[1:])
