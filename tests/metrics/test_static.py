"""Costs that depend on the image size alone."""

from __future__ import annotations

from typing import Any

import pytest

from dyndet import build_detector
from dyndet.metrics.static import StaticCosts
from dyndet.ops.flops import MacCounter, count_macs

PARTS = ("backbone", "neck", "predictor")


@pytest.mark.parametrize("experiment", ["shapes_dyn", "bccd_static"])
def test_every_size_costs_what_a_count_gives(experiment: str) -> None:
    detector = build_detector(experiment, ["backbone.weights=none"])
    costs = StaticCosts(detector)
    for size in ((64, 96), (50, 70), (64, 96)):
        expected = count_macs(detector, size)
        assert costs(size, routed=False) == {part: expected[part] for part in (*PARTS, "head")}
        assert costs(size, routed=True) == {part: expected[part] for part in PARTS}
    assert costs((50, 70), routed=True) != costs((64, 96), routed=True)


def test_every_size_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[tuple[int, int]] = []
    count = MacCounter.count

    def spy(self: MacCounter, size: tuple[int, int], **kwargs: Any) -> dict[str, int]:
        counted.append(size)
        return count(self, size, **kwargs)

    monkeypatch.setattr(MacCounter, "count", spy)
    costs = StaticCosts(build_detector("shapes_dyn"))
    for size in ((64, 96), (64, 64), (64, 96), [64, 64]):
        costs(size, routed=True)
    assert counted == [(64, 96), (64, 64)]
