"""Paired timing: what is compared runs side by side, so that a machine that slows down slows all of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Run = Callable[[], object]

# More than any L2 cache holds.
_FLUSH_BYTES = 256 << 20
# Filling it so often keeps a fast GPU busy for a millisecond, in which the host prepares what is timed: launches of a
# few operations are hidden on both sides. What launches cost a whole head shows where nothing is graphed.
_FLUSHES = 16
# Event timings of one call scatter by microseconds; a round takes the median of a few.
_CUDA_CALLS = 5


@dataclass(frozen=True)
class Timing:
    """One variant, in milliseconds, and its speed relative to the first variant of every round (above 1: faster)."""

    ms: float
    least: float
    ratio: float
    low: float
    high: float


def compare(variants: dict[str, Run], device: torch.device, rounds: int) -> dict[str, Timing]:
    """Times every variant once a round, in rotated order.

    Args:
        variants: the first is what the others are compared with.
        device: they run on.
        rounds: number.

    Returns:
        Per variant the medians over the rounds, and the 10 % and 90 % quantiles of the paired ratio.
    """
    clock = _CudaClock(device) if device.type == "cuda" else _cpu_clock
    names = list(variants)
    for _ in range(2):
        for run in variants.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(clock(variants[name]))
    return {name: _summary(times[names[0]], taken) for name, taken in times.items()}


def _summary(reference: list[float], taken: list[float]) -> Timing:
    ratios = [base / ms for base, ms in zip(reference, taken, strict=True)]
    low, high = torch.tensor(ratios, dtype=torch.float64).quantile(torch.tensor([0.1, 0.9], dtype=torch.float64))
    return Timing(statistics.median(taken), min(taken), statistics.median(ratios), float(low), float(high))


def _cpu_clock(run: Run) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


class _CudaClock:
    """Device time between two events, with a cache full of something else."""

    def __init__(self, device: torch.device) -> None:
        self.flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, run: Run) -> float:
        return statistics.median(self._once(run) for _ in range(_CUDA_CALLS))

    def _once(self, run: Run) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(_FLUSHES):
            self.flush.zero_()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)
