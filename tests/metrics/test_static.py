"""Costs that depend on the image size alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor, nn

from dyndet import build_detector
from dyndet.metrics.static import StaticCosts
from dyndet.models.detectors.pyramid import PyramidDetector
from dyndet.models.heads.branches import BRANCHES
from dyndet.models.heads.chain import HeadChain
from dyndet.models.heads.fine_grained import FineGrainedHead
from dyndet.ops.flops import MacCounter, count_macs
from dyndet.routing import GatedPath, LayerCost, Routing, Work
from dyndet.structures import HeadOutput

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


@pytest.mark.parametrize(("experiment", "times"), [("shapes_dyn", 1), ("shapes_dyhead_dyn", 3)])
def test_heads_of_gates_alone_are_counted_once(experiment: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the slowest part to count, and cost nothing that routing does not tell."""
    ran, forward = [], FineGrainedHead.forward

    def spy(self: FineGrainedHead, *inputs: Any) -> HeadOutput:
        ran.append(self)
        return forward(self, *inputs)

    monkeypatch.setattr(FineGrainedHead, "forward", spy)
    costs = StaticCosts(build_detector(experiment))
    for size in ((64, 96), (64, 64), (96, 64)):
        costs(size, routed=True)
    assert len(ran) == times


class Toy(nn.Module):
    """A dense 1x1 convolution, then a 1x1 convolution of which gates decide, and the convolution that gates it."""

    def __init__(self, channels: int, *, reports: bool) -> None:
        super().__init__()
        self.first, self.gated, self.gate = (nn.Conv2d(channels, width, 1) for width in (channels, channels, 1))
        self.reports = reports

    def forward(self, features: Sequence[Tensor], valid: Sequence[Tensor] | None = None) -> HeadOutput:
        maps = [self.first(x) for x in features]
        gates = [self.gate(x).sigmoid() for x in maps]
        weight = float(self.gated.weight.numel())
        path = GatedPath("cls.0", "depth", (LayerCost(weight),), router_macs=float(self.gate.weight.numel()))
        routing = Routing.of([path], gates, valid)
        if self.reports:
            routing.work.append(Work(weight, routing.layout.positions))
        maps = [x + gate * self.gated(x) for x, gate in zip(maps, gates, strict=True)]
        return HeadOutput(maps, maps, routing)


@pytest.mark.parametrize("reports", [True, False])
def test_a_dense_layer_before_gates_is_counted(reports: bool) -> None:
    detector = build_detector("shapes_dyn")
    assert isinstance(detector, PyramidDetector)
    (channels,) = {detector.neck.channels} if isinstance(detector.neck.channels, int) else set(detector.neck.channels)
    detector.head = Toy(channels, reports=reports)
    for height, width in ((64, 96), (128, 64)):
        positions = sum(-(-height // stride) * -(-width // stride) for stride in detector.strides)
        always = StaticCosts(detector)((height, width), routed=True)
        assert always["head"] == channels**2 * positions
        assert count_macs(detector, (height, width))["head"] == (2 * channels**2 + channels) * positions


VARIANTS = ["norm_stats=dense", "norm_stats=position", "norm_stats=published", "gating=none", "gating=depth",
    "gate_kernel=1", "coarse=true", "cost_table=published", "impl=gather", "impl=triton", "depth=3"]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_of_a_fine_grained_head_is_outside_its_gates(variant: str) -> None:
    counter = MacCounter(build_detector("shapes_dyn", [f"head.{variant}"]))
    for size in ((64, 96), (70, 50)):
        assert "head" not in counter.count(size, gated=False)


def test_attention_before_fine_grained_towers_is_counted() -> None:
    detector = build_detector("shapes_dyhead_dyn")
    assert isinstance(detector, PyramidDetector) and isinstance(detector.head, HeadChain)
    costs = StaticCosts(detector)
    alone = copy.deepcopy(detector)
    alone.head = detector.head.attention
    alone.head.branches = BRANCHES  # its one map for both
    for size in ((64, 96), (64, 64)):
        assert costs(size, routed=True)["head"] == count_macs(alone, size)["head"] > 0
