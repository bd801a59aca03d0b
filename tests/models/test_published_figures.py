"""Parameters and multiply-adds against the published figures and exact integers."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from dyndet import build_detector
from dyndet.models.detectors.dense import DenseDetector
from dyndet.ops.flops import GIBI, GIGA, count_macs
from dyndet.routing import Routing
from dyndet.structures import Size
from routing_views import PathGate, routing_of

R101 = "fcos_r50 backbone.name=resnet101.tv_in1k"
UNPADDED: Size = (800, 1333)
PADDED: Size = (800, 1344)
LEVELS_PADDED = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]


@cache
def detector(experiment: str, *overrides: str) -> DenseDetector:
    with torch.device("meta"):
        name, *more = experiment.split()
        return build_detector(name, [*more, *overrides])


def parameters(experiment: str, *overrides: str) -> int:
    return sum(parameter.numel() for parameter in detector(experiment, *overrides).parameters())


def all_open(experiment: str) -> Routing:
    """The routing of one 800 x 1344 image with every gate open."""
    head = detector(experiment).head
    gates = []
    for branch in ("cls", "reg"):
        for index, node in enumerate(getattr(head, branch)):
            for path, costs in node.costs.items():
                for level, (height, width) in enumerate(LEVELS_PADDED):
                    gate = torch.ones(1, 1, height, width)
                    gates.append(PathGate(f"{branch}.{index}", path, level, gate, costs))
    return routing_of(gates)


@pytest.mark.parametrize(
    ("experiment", "source", "count"),
    [
        ("fcos_d8_dyn", "C5", 50_801_130),
        ("fcos_d8_dyn", "P5", 46_672_362),
        ("fcos_r50", "C5", 36_426_138),
        ("fcos_r50", "P5", 32_297_370),
    ],
)
def test_parameters(experiment: str, source: str, count: int) -> None:
    assert parameters(experiment, f"neck.extra_source={source}") == count


def test_node_parameters() -> None:
    dynamic, fixed = detector("fcos_d8_dyn").head, detector("fcos_d8").head
    assert sum(p.numel() for p in dynamic.cls[0].parameters()) == 1_193_733
    assert sum(p.numel() for p in fixed.cls[0].parameters()) == 1_186_817
    assert sum(p.numel() for p in dynamic.parameters()) == 16 * 1_193_733


@pytest.mark.parametrize(
    ("experiment", "size", "macs"),
    [
        ("fcos_r50", UNPADDED, 109_591_833_600),
        ("fcos_d8 head.depth=4", UNPADDED, 215_638_502_400),
        ("fcos_d8 head.depth=6", UNPADDED, 321_274_137_600),
        ("fcos_d8", UNPADDED, 426_909_772_800),
        ("fcos_d8_dyn head.depth=4", UNPADDED, 216_871_603_200),
        ("fcos_d8_dyn head.depth=6", UNPADDED, 323_123_788_800),
        ("fcos_d8_dyn", UNPADDED, 429_375_974_400),
        ("fcos_r50", PADDED, 110_083_276_800),
        ("fcos_d8", PADDED, 428_824_166_400),
        ("fcos_d8_dyn", PADDED, 431_301_427_200),
    ],
)
def test_head_macs(experiment: str, size: Size, macs: int) -> None:
    counts = count_macs(detector(experiment), size)
    assert counts["head"] + counts["predictor"] == macs
    assert counts["total"] == sum(counts[part] for part in ("backbone", "neck", "head", "predictor"))


def test_fixed_head_of_depth_two() -> None:
    counts = count_macs(detector("fcos_d8", "head.depth=2"), UNPADDED)
    assert counts["head"] + counts["predictor"] == 110_002_867_200


@pytest.mark.parametrize(
    ("experiment", "overrides", "size", "macs"),
    [
        ("fcos_r50", (), UNPADDED, 87_333_299_200),
        ("fcos_r50", ("backbone.stride_in_1x1=true",), UNPADDED, 82_401_715_200),
        (R101, (), UNPADDED, 166_880_896_000),
        (R101, ("backbone.stride_in_1x1=true",), UNPADDED, 161_949_312_000),
        ("fcos_r50", (), PADDED, 87_581_491_200),
        ("fcos_r50", ("backbone.stride_in_1x1=true",), PADDED, 82_626_969_600),
        (R101, (), PADDED, 167_129_088_000),
    ],
)
def test_backbone_macs(experiment: str, overrides: tuple[str, ...], size: Size, macs: int) -> None:
    assert count_macs(detector(experiment, *overrides), size)["backbone"] == macs


@pytest.mark.parametrize(
    ("source", "size", "macs"),
    [
        ("C5", UNPADDED, 18_120_638_464),
        ("P5", UNPADDED, 16_993_484_800),
        ("C5", PADDED, 18_192_728_064),
        ("P5", PADDED, 17_065_574_400),
    ],
)
def test_neck_macs(source: str, size: Size, macs: int) -> None:
    assert count_macs(detector("fcos_r50", f"neck.extra_source={source}"), size)["neck"] == macs


@pytest.mark.parametrize(("experiment", "cost"), [("fcos_d8_dyn", 397.168), ("fcos_d8_dyn head.depth=4", 198.584)])
def test_head_cost_in_the_papers_convention(experiment: str, cost: float) -> None:
    routing = all_open(experiment)
    assert routing.full().item() / GIBI == pytest.approx(cost, abs=1e-3)
    assert routing.used().item() == routing.full().item()


def test_plain_head_cost_in_the_papers_convention() -> None:
    assert count_macs(detector("fcos_r50"), UNPADDED)["head"] / GIBI == pytest.approx(98.0, abs=0.01)


def test_published_table_counts_scale_convolutions_twice() -> None:
    published, corrected = detector("fcos_d8_dyn"), detector("fcos_d8_dyn", "head.cost_table=corrected")
    assert [cost.macs for cost in published.head.cls[0].costs["up"]] == [4_864]
    assert [cost.macs for cost in corrected.head.cls[0].costs["up"]] == [2_560]
    for head in (published.head, corrected.head):
        assert [(cost.macs, cost.reach) for cost in head.cls[0].costs["depth"]] == [(590_080, 1), (590_080, 0)]


def test_whole_network_totals_of_the_paper() -> None:
    fcos = count_macs(detector("fcos_r50"), UNPADDED)["total"] / GIGA
    assert fcos == pytest.approx(216.7, rel=0.01)
    assert count_macs(detector(R101), UNPADDED)["total"] / GIGA == pytest.approx(296.0, rel=0.01)
    # The paper swaps the plain head (98.04 GiMAC, norms counted) for the deep one in the same unit.
    plain = (8 * (589_824 + 256) * 22_300) / GIBI
    deep = 16 * (2 * 589_824 + 2 * 2_304 + 4 * 256) * 22_300 / GIBI
    assert 216.7 - plain + deep == pytest.approx(512.5, abs=0.1)
