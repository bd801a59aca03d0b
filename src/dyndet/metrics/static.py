"""The part of a detector's cost that depends on the image size alone."""

from __future__ import annotations

from collections.abc import Sequence

from dyndet.models.detectors.base import Detector
from dyndet.ops.flops import MacCounter


class StaticCosts:
    """Dense multiply-adds per part and image size, counted once per size; padding does not count."""

    def __init__(self, detector: Detector) -> None:
        self._detector = detector
        self._counter: MacCounter | None = None
        self._known: dict[tuple[int, int, bool], dict[str, int]] = {}

    def __call__(self, size: Sequence[int], *, routed: bool) -> dict[str, int]:
        """(H, W) in pixels -> MACs of the parts that always run; a routed head is not among them."""
        height, width = size
        key = height, width, routed
        if key not in self._known:
            if self._counter is None:  # not before it is needed: it copies the detector
                self._counter = MacCounter(self._detector)
            counts = self._counter.count((height, width), head=not routed)
            self._known[key] = {part: macs for part, macs in counts.items() if part != "total"}
        return self._known[key]
