"""Heads build, run and price the branches that a predictor reads, and no other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dyndet import build_detector
from dyndet.api import detector_from
from dyndet.checkpoints.read import Checkpoint
from dyndet.cli.compose import compose_experiment
from dyndet.errors import UserError
from dyndet.models.detectors.base import Branch
from dyndet.models.detectors.pyramid import PyramidDetector
from dyndet.models.heads.chain import HeadChain
from dyndet.models.heads.dyhead import DyHead
from dyndet.models.heads.fine_grained import FineGrainedHead
from dyndet.models.heads.fixed import FixedHead
from dyndet.models.heads.none import NoHead
from dyndet.models.heads.plain import PlainHead
from dyndet.models.heads.separable import SeparableHead
from dyndet.ops.flops import count_macs
from dyndet.structures import HeadOutput

SHAPES = [(12, 16), (6, 8), (3, 4)]
FINE: dict[str, Any] = {"depth": 2, "norm_groups": 2, "scale_init": 0.5, "openness": 0.6}
HEADS: dict[str, Callable[..., Any]] = {
    "plain": partial(PlainHead, norm_groups=2),
    "fixed": partial(FixedHead, depth=2, norm_groups=2),
    "fine_grained": partial(FineGrainedHead, **FINE),
    "coarse": partial(FineGrainedHead, **FINE, coarse=True),
    "separable": partial(SeparableHead, num_levels=3),
    "dyhead": partial(DyHead, num_blocks=1, gn_groups=2),
    "chain": partial(
        HeadChain, attention=partial(DyHead, num_blocks=1, gn_groups=2), towers=partial(FineGrainedHead, **FINE)
    ),
    "none": NoHead,
}


def pyramid() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 8, *shape, generator=generator) for shape in SHAPES]


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("branch", ["cls", "reg"])
def test_one_branch_is_that_of_the_whole_head(name: str, branch: Branch) -> None:
    torch.manual_seed(0)
    whole, part = HEADS[name](8), HEADS[name](8, branches=[branch])
    other = "reg" if branch == "cls" else "cls"
    weights = {key: value for key, value in whole.state_dict().items() if other not in key.split(".")}
    part.load_state_dict(weights)
    towers = name not in ("dyhead", "none")
    assert (len(weights) < len(whole.state_dict())) == towers
    expected, output = whole(pyramid()), part(pyramid())
    assert getattr(output, other) == []
    for a, b in zip(getattr(output, branch), getattr(expected, branch), strict=True):
        assert torch.equal(a, b)
    if expected.routing is None:
        assert output.routing is None
        return
    assert [path.node for path in output.routing.paths] == [
        path.node for path in expected.routing.paths if path.node.startswith(branch)
    ]
    assert torch.equal(2 * output.routing.full(), expected.routing.full())
    assert all(work.node.startswith(branch) for work in output.routing.work)


def test_branches_start_alike_however_they_are_written() -> None:
    def start(branches: Sequence[Branch]) -> Tensor:
        torch.manual_seed(0)
        return PlainHead(8, norm_groups=2, branches=branches).get_parameter("cls.0.weight")

    assert torch.equal(start(["cls"]), start(["cls", "reg"])) and torch.equal(start(["cls"]), start(["reg", "cls"]))
    for wrong in ([], ["box"]):
        with pytest.raises(ValueError, match="branches must be some of cls, reg"):
            PlainHead(8, norm_groups=2, branches=wrong)  # type: ignore[arg-type]


def test_one_branch_is_executed_and_closed_like_two() -> None:
    head = FineGrainedHead(8, **FINE, branches=["reg"])
    assert head.execute("dense") == "auto" and head.execute("auto") == "dense"
    assert head.gate_threshold == 0
    head.close_below(1.0)
    assert head.gate_threshold == 1
    routing = head(pyramid()).routing
    assert routing is not None and not routing.used().any()


@pytest.mark.parametrize("head", ["plain_small", "fine_grained_small", "dyhead_towers_small", "separable_small"])
def test_what_is_not_read_costs_nothing(head: str) -> None:
    """Both branches are alike, so the towers of a predictor that reads one cost half."""
    choice = [f"head={head}", "neck.channels=16", "backbone.frozen_stages=-1"]

    def tower_cost(*more: str) -> tuple[int, int]:
        detector = build_detector(None, [*choice, *more])
        assert isinstance(detector, PyramidDetector)
        attention = detector.head.attention if isinstance(detector.head, HeadChain) else None
        shared = sum(p.numel() for p in attention.parameters()) if isinstance(attention, nn.Module) else 0
        weights = sum(p.numel() for name, p in detector.named_parameters() if name.startswith("head.")) - shared
        return weights, count_macs(detector, (64, 64))["head"]

    both, one, two_stage = (
        tower_cost("predictor=fcos_small"),
        tower_cost("predictor=yolo_p5_small"),
        tower_cost("predictor=faster_rcnn_small", "detector=two_stage"),
    )
    assert one == two_stage and 2 * one[0] == both[0]
    assert one[1] < both[1] if "dyhead" in head else 2 * one[1] == both[1]


class Outside(nn.Module):
    """A head of someone else, which knows nothing of branches."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, features: Sequence[Tensor], valid: Sequence[Tensor] | None = None) -> HeadOutput:
        maps = [self.conv(x) for x in features]
        return HeadOutput(maps, maps)


def test_a_head_without_branches_fits_predictors_that_read_all() -> None:
    place = f"{Outside.__module__}.Outside"
    outside = [f"head={{_target_: {place}, _partial_: true}}"]
    detector = build_detector(None, ["~head", "+" + outside[0]])
    assert len(detector.raw_outputs(torch.rand(1, 3, 64, 64))) == 3
    for more in (["predictor=yolo_p5_small"], ["predictor=faster_rcnn_small", "detector=two_stage"]):
        with pytest.raises(UserError, match="Outside builds all branches, but this predictor reads only cls") as caught:
            build_detector(None, ["~head", "+" + outside[0], *more])
        assert "`branches`" in str(caught.value) and "\n" not in str(caught.value)


def test_checkpoints_with_a_tower_that_nobody_read_load() -> None:
    """Earlier versions built it; nothing that was computed depended on it."""
    options = ["data.num_classes=4", "predictor=yolo_p5_small", "head=plain_small"]
    config = compose_experiment("shapes_static", options)
    detector = build_detector("shapes_static", options)
    weights = detector.state_dict()
    towers = {name.replace("head.cls", "head.reg"): x for name, x in weights.items() if name.startswith("head.cls")}
    assert towers
    loaded = detector_from(Checkpoint(config, [], {**weights, **towers}))
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    with pytest.raises(RuntimeError, match="nobody"):
        detector_from(Checkpoint(config, [], {**weights, "head.nobody": torch.zeros(1)}))
