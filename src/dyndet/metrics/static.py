"""The part of a detector's cost that depends on the image size alone."""

from __future__ import annotations

from collections.abc import Sequence

from dyndet.metrics.compute import ComputeMeter
from dyndet.models.detectors.base import Detector
from dyndet.ops.flops import MacCounter
from dyndet.routing import Routes, Routing


class StaticCosts:
    """Dense multiply-adds per part and image size, counted once per size; padding does not count, unless the network
    cannot do without, or images lie in the middle of a canvas, where it is treated like the image.
    """

    def __init__(self, detector: Detector) -> None:
        self._detector = detector
        self._counter: MacCounter | None = None
        self._known: dict[tuple[int, int, bool, str | None], dict[str, int]] = {}

    def __call__(self, size: Sequence[int], *, routed: bool, route: str | None = None) -> dict[str, int]:
        """(H, W) in pixels -> MACs of the parts that always run; of a routed head what its gates do not rule.

        Args:
            size: of the image.
            routed: whether the head routes.
            route: the way through a dynamic detector, "first" or "second".
        """
        divisor = self._detector.size_divisor
        height, width = (-(-side // divisor) * divisor for side in self._detector.preprocess.canvas(size))
        key = height, width, routed, route
        if key not in self._known:
            if self._counter is None:  # not before it is needed: it copies the detector
                self._counter = MacCounter(self._detector)
            counts = self._counter.count((height, width), gated=not routed, route=route)
            self._known[key] = {part: macs for part, macs in counts.items() if part != "total"}
        return self._known[key]


def meter_batch(
    meter: ComputeMeter, static: StaticCosts, routing: Routing | Routes | None, sizes: Sequence[Sequence[int]]
) -> list[float]:
    """Adds a batch to a meter and returns the multiply-adds of each of its images.

    Args:
        meter: that adds up.
        static: of the same detector.
        routing: what `detect_with_routing` gave.
        sizes: (H, W) of every image.
    """
    if not isinstance(routing, Routes):
        return meter.update(routing, [static(size, routed=routing is not None) for size in sizes])
    spent = [0.0] * len(sizes)
    for hard, indices, inside in routing.parts():
        route = "second" if hard else "first"
        parts = [static(sizes[index], routed=inside is not None, route=route) for index in indices]
        for index, macs in zip(indices, meter.update(inside, parts, hard=hard), strict=True):
            spent[index] = macs
    return spent
