"""Compare records of bench_sparse.py with the goals: one line per goal, PASS, FAIL or not measured.

    python scripts/check_goals.py RECORDS.jsonl [--margin 0.6] [--goals scripts/bench/goals.yaml]

Of several records of one case the last counts. Exits with 1 when a goal that was measured fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GOALS = Path(__file__).parent / "bench" / "goals.yaml"
NOT_MEASURED = "not measured"

Record = dict[str, Any]
Points = dict[float, float]
"""Value per density in percent; 0 stands for all densities together."""


@dataclass(frozen=True)
class Verdict:
    """A line of the table; `measured` holds the worst value of every density."""

    goal: str
    what: str
    status: str
    measured: Points
    wanted: str
    stretch: bool


def check(goal: str, spec: dict[str, Any], records: Sequence[Record], margin: float = 1.0) -> Verdict:
    """Judges one goal.

    Args:
        goal: its id.
        spec: its entry in the YAML file, which explains the fields.
        records: of all cases.
        margin: share of a goal that counts as reaching it, at most 1; counts are exact and have none.
    """
    measure, more = spec["measure"], spec["better"] == "more"
    where = spec["where"] if isinstance(spec["where"], list) else [spec["where"]]
    parts = [_points(measure, [record for record in records if _matches(record, fields)]) for fields in where]
    worst = min if more else max
    exact = measure not in ("ratio", "time", "crossover", "rank")
    softened = 1.0 if exact else margin if more else 1 / margin

    relevant = set(spec["must"]) if isinstance(spec["must"], dict) else {at for points in parts for at in points}
    measured = {
        at: worst(points[at] for points in parts if at in points)
        for at in sorted(relevant)
        if any(at in points for points in parts)
    }
    passed = _reached(parts, spec["must"], more, softened)
    return Verdict(
        goal,
        spec["what"],
        NOT_MEASURED if passed is None else "PASS" if passed else "FAIL",
        measured,
        _written(spec["must"], ">=" if more else "<="),
        "stretch" in spec and bool(_reached(parts, spec["stretch"], more, 1.0)),
    )


def _reached(parts: Sequence[Points], limits: Any, more: bool, factor: float) -> bool | None:
    """False as soon as one measured value misses its limit, None when some are missing and none misses."""
    missing = False
    for points in parts:
        wanted = set(limits if isinstance(limits, dict) else points)
        missing |= not points or not wanted <= set(points)
        for density in wanted & set(points):
            value, limit = points[density], factor * (limits[density] if isinstance(limits, dict) else limits)
            if not (value >= limit if more else value <= limit):
                return False
    return None if missing else True


def _matches(record: Record, fields: dict[str, Any]) -> bool:
    # A density that was chosen through its multiply-adds belongs to the goals that ask for them.
    return all(record.get(key) == value for key, value in {"macs_asked": None, **fields}.items())


def _points(measure: str, records: Sequence[Record]) -> Points:
    by_density = {float(record["density"]): record for record in records}
    ratios = {density: record["ratio"] for density, record in sorted(by_density.items())}
    if measure == "ratio":
        return ratios
    if measure == "time":
        return {density: 1 / ratio for density, ratio in ratios.items()}
    if measure == "crossover":
        return {} if len(ratios) < 2 else {0.0: crossover(list(ratios), list(ratios.values())) / 100}
    if measure == "rank":
        taken = [record for density, record in by_density.items() if 5 <= density <= 50]
        times, macs = ([record[name] for record in taken] for name in ("ms_sparse", "macs"))
        return {} if len(taken) < 3 else {0.0: spearman(times, macs)}
    return {density: record[measure] for density, record in by_density.items() if measure in record}


def crossover(densities: Sequence[float], ratios: Sequence[float]) -> float:
    """The first density, ascending, at which the ratio falls to 1, between measurements by a straight line."""
    if ratios[0] <= 1:
        return 0.0
    for index in range(1, len(ratios)):
        above, below = ratios[index - 1], ratios[index]
        if below <= 1:
            return densities[index - 1] + (above - 1) / (above - below) * (densities[index] - densities[index - 1])
    return densities[-1]


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation: that of the ranks, which equal values share."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values]

    middle = (len(first) - 1) / 2
    a, b = ([rank - middle for rank in ranks(list(values))] for values in (first, second))
    scale = (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5
    return sum(x * y for x, y in zip(a, b, strict=True)) / scale if scale else 0.0


def _written(points: Any, sign: str = "") -> str:
    values = points if isinstance(points, dict) else {0.0: points}
    return ", ".join(
        f"{sign}{' ' if sign else ''}{value:.3g}{f' at {at:g} %' if at else ''}" for at, value in values.items()
    )


def read(path: Path) -> list[Record]:
    """Records of a file of JSON lines.

    Raises:
        ValueError: on a line that is none.
    """
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is no JSON: {error}") from error
    return records


def table(verdicts: Sequence[Verdict], write: Callable[[str], object] = print) -> None:
    write(f"{'goal':5}{'status':14}{'measured':40}{'must':46}what")
    for verdict in verdicts:
        status = f"{verdict.status}{' +' if verdict.stretch else ''}"
        write(f"{verdict.goal:5}{status:14}{_written(verdict.measured):40}{verdict.wanted:46}{verdict.what}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("records", type=Path, nargs="+", help="JSON lines written by bench_sparse.py")
    parser.add_argument("--goals", type=Path, default=GOALS)
    parser.add_argument("--margin", type=float, default=1.0, help="share of a goal that passes (shared cores: 0.6)")
    parser.add_argument("--only", help="goals whose id begins so, e.g. C")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.margin <= 1:
        parser.error(f"--margin is a share, above 0 and at most 1, got {arguments.margin:g}")
    try:
        import yaml
    except ModuleNotFoundError:
        parser.error("needs the package pyyaml")
    try:
        records = [record for path in arguments.records for record in read(path)]
        goals = yaml.safe_load(arguments.goals.read_text())
    except (OSError, ValueError) as error:
        parser.error(str(error))
    chosen = {name: spec for name, spec in goals.items() if name.startswith(arguments.only or "")}
    verdicts = [check(name, spec, records, arguments.margin) for name, spec in chosen.items()]
    table(verdicts)
    failed = [verdict.goal for verdict in verdicts if verdict.status == "FAIL"]
    missing = sum(verdict.status == NOT_MEASURED for verdict in verdicts)
    margin = f" with margin {arguments.margin:g}" if arguments.margin != 1 else ""
    print(f"\n{len(verdicts)} goals{margin}: {len(failed)} failed, {missing} not measured; + reaches the stretch goal")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
