"""The part of a detector's cost that depends on the image size alone."""

from __future__ import annotations

from collections.abc import Sequence

from dyndet.models.detectors.base import Detector
from dyndet.ops.flops import count_macs


class StaticCosts:
    """Dense multiply-adds per part and image size, counted once per size; padding does not count."""

    def __init__(self, detector: Detector) -> None:
        self._detector = detector
        self._known: dict[tuple[int, int], dict[str, int]] = {}

    def __call__(self, size: Sequence[int], *, routed: bool) -> dict[str, int]:
        """(H, W) in pixels -> MACs of the parts that always run; a routed head is not among them."""
        height, width = size
        if (height, width) not in self._known:
            self._known[height, width] = count_macs(self._detector, (height, width))
        parts = self._known[height, width]
        return {part: macs for part, macs in parts.items() if part != "total" and not (routed and part == "head")}
