"""Whole training steps and inferences of experiments, this checkout against another, or against the fixed head.

    python scripts/bench_steps.py                                   # against the fixed head
    python scripts/bench_steps.py --against ../parent/.venv/bin/python

One process per side; they take turns, one step each, in rotated order, so that a machine that slows down slows both.
Random weights, images and boxes; gates open at blobs of the given density and still follow their logits. A training
step is the losses with the cost of the routing, the backward pass and the optimiser's step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from bench.steps import detector_of, inference, training_step

FIXED = "fixed"


def prepared(case: dict[str, Any]) -> Callable[[], object]:
    """One step of a case: experiment, train or not, batch, size, and the density in percent or "fixed"."""
    density = None if case["density"] == FIXED else case["density"] / 100
    detector, size = detector_of(case["experiment"], density), tuple(case["size"])
    return training_step(detector, case["batch"], size) if case["train"] else inference(detector, size)


def work() -> None:
    """Prepares the cases that it is told, and runs one step of one of them for every further line."""
    cases = [prepared(case) for case in json.loads(input())]
    print("ready", flush=True)
    clock = time.process_time if "cpu" in sys.argv else time.perf_counter
    for line in sys.stdin:
        start = clock()
        cases[int(line)]()
        print(1e3 * (clock() - start), flush=True)


class Side:
    """A process that runs steps on request."""

    def __init__(self, python: str, cases: list[dict[str, Any]], clock: str) -> None:
        self.process = subprocess.Popen(
            [python, __file__, "--worker", "--clock", clock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ask(json.dumps(cases))

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--against", help="python of another checkout; without it the fixed head is the reference")
    parser.add_argument("--experiments", nargs="+", default=["bccd_dyn", "shapes_dyn"])
    parser.add_argument("--density", nargs="+", type=float, default=[5, 20, 100], help="percent")
    parser.add_argument("--modes", nargs="+", choices=("train", "predict"), default=["train", "predict"])
    parser.add_argument("--size", nargs=2, type=int, default=(240, 320), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=8, help="of a training step; inference takes one image")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: of a shared machine, one thread")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work()
    cases = [
        {
            "experiment": experiment,
            "train": mode == "train",
            "batch": arguments.batch if mode == "train" else 1,
            "size": list(arguments.size),
            "density": density,
        }
        for experiment in arguments.experiments
        for mode in arguments.modes
        for density in arguments.density
    ]
    other = cases if arguments.against else [{**case, "density": FIXED} for case in cases]
    pythons = sys.executable, arguments.against or sys.executable
    sides = [Side(python, told, arguments.clock) for python, told in zip(pythons, (cases, other), strict=True)]
    print(f"{'case':30}{'ms':>9}{'other':>9}{'ratio':>8}{'10 %':>8}{'90 %':>8}   (above 1: this is faster)", flush=True)
    for index, case in enumerate(cases):
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(arguments.rounds + 2):
            for which in (0, 1) if turn % 2 else (1, 0):
                ms = float(sides[which].ask(str(index)))
                if turn > 1:
                    times[which].append(ms)
        ratios = sorted(other / mine for mine, other in zip(*times, strict=True))
        mode = "train" if case["train"] else "predict"
        name = f"{case['experiment']} {mode} {case['density']:g} %"
        low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
        medians = [statistics.median(values) for values in (*times, ratios)]
        print(f"{name:30}{medians[0]:9.1f}{medians[1]:9.1f}{medians[2]:8.2f}{low:8.2f}{high:8.2f}", flush=True)
    return None


if __name__ == "__main__":
    main()
