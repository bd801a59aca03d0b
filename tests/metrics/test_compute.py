"""Closed forms of the compute report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from dyndet.metrics.compute import ComputeMeter, ComputeReport
from dyndet.routing import LayerCost, Routing, Work
from routing_views import PathGate, routing_of


def gate(open_counts: list[int], positions: int = 4, value: float = 0.5) -> Tensor:
    """(B, 1, 1, positions), the first n open."""
    rows = [[value] * count + [0.0] * (positions - count) for count in open_counts]
    return torch.tensor(rows)[:, None, None]


def routing(depth: list[int], up: list[int]) -> Routing:
    """Depth costs 100 MACs on each of 4 positions of level 0, up 50 on each of 2 of level 1; routers 1 everywhere."""
    return routing_of(
        [
            PathGate("cls.0", "depth", 0, gate(depth), (LayerCost(100.0),), router_macs=1.0),
            PathGate("cls.0", "up", 1, gate(up, 2), (LayerCost(50.0),), router_macs=1.0),
        ]
    )


def test_work_is_summed_over_batches() -> None:
    meter = ComputeMeter()
    for rows in (3, 5):
        batch = routing([4, 1], [0, 0])
        batch.work.extend([Work(10.0, rows, tile=4), Work(2.0, torch.tensor([rows], dtype=torch.int32), dense=8)])
        meter.update(batch, [STATIC, STATIC])
    report = meter.compute()
    assert report.asked == (3 + 5) * (10 + 2) / 4
    assert report.executed == (4 * 10 + 8 * 2 + 8 * 10 + 8 * 2) / 4
    assert report.as_scalars()["macs/head_executed_mean"] == report.executed


STATIC = {"backbone": 1000.0, "neck": 200.0}


def filled(meter: ComputeMeter) -> ComputeMeter:
    meter.update(routing([4, 1], [0, 0]), [STATIC, STATIC])  # used 400 and 100 of 500
    meter.update(routing([0], [0]), [{"backbone": 2000.0, "neck": 200.0}])  # used 0
    return meter


def test_closed_form() -> None:
    report = filled(ComputeMeter(strides=(8, 16))).compute()
    assert report.images == 3
    assert (report.head.mean, report.head.min, report.head.max) == (pytest.approx(500 / 3), 0, 400)
    assert report.full.mean == report.full.min == report.full.max == 500
    assert report.overhead == 6
    assert report.reference.max == 400 * 22_400 / 6  # the used MACs per position of the pyramid
    assert (report.total.min, report.total.max) == (1306, 2206)
    assert report.total.mean == pytest.approx((1606 + 1306 + 2206) / 3)
    assert report.ratio == pytest.approx((0.8 + 0.2 + 0) / 3)
    assert report.soft_ratio == pytest.approx((0.4 + 0.1 + 0) / 3)
    assert report.open == {("cls.0", "depth", 0): pytest.approx((1 + 0.25 + 0) / 3), ("cls.0", "up", 1): 0}
    assert report.dead == [("cls.0", "up", 1)]
    assert report.always_open == []
    assert report.parts == {"backbone": pytest.approx(4000 / 3), "neck": 200}


def test_ratio_of_sums_weighs_large_images_more() -> None:
    meter = ComputeMeter()
    small, large = gate([1], 1), gate([0], 9)
    meter.update(routing_of([PathGate("a", "depth", 0, small, (LayerCost(10.0),))]), [{}])
    meter.update(routing_of([PathGate("a", "depth", 0, large, (LayerCost(10.0),))]), [{}])
    report = meter.compute()
    assert report.ratio == 0.5
    assert report.ratio_of_sums == pytest.approx(0.1)
    assert report.open["a", "depth", 0] == 0.5


def test_a_static_part_of_the_head_counts_as_head_once() -> None:
    meter = ComputeMeter()
    meter.update(routing([2], [0]), [STATIC | {"head": 300.0}])
    report = meter.compute()
    assert (report.head.mean, report.full.mean, report.total.mean) == (500, 800, 1706)
    assert report.ratio == pytest.approx(5 / 8) and report.soft_ratio == pytest.approx(4 / 8)


def test_static_head() -> None:
    meter = ComputeMeter()
    meter.update(None, [{"head": 300.0, "backbone": 700.0}])
    report = meter.compute()
    assert (report.head.mean, report.total.mean, report.ratio, report.overhead) == (300, 1000, 1, 0)
    assert not report.open and "gates/dead" not in report.as_scalars()


def test_always_open_means_everywhere_on_every_image() -> None:
    meter = ComputeMeter()
    meter.update(routing([4, 4], [2, 1]), [STATIC] * 2)
    assert meter.compute().always_open == [("cls.0", "depth", 0)]
    meter.update(routing([3], [2]), [STATIC])
    assert meter.compute().always_open == []


def test_names_scalars_and_table() -> None:
    report = filled(ComputeMeter(strides=(8, 16))).compute()
    scalars = report.as_scalars()
    assert scalars["gates/cls.0.depth/P3"] == pytest.approx(1.25 / 3)
    assert scalars["gates/cls.0.up/P4"] == 0 and scalars["gates/dead"] == 1
    assert scalars["macs/head_used_mean"] == pytest.approx(500 / 3)
    assert scalars["macs/total_max"] == 2206 and scalars["macs/backbone_mean"] == pytest.approx(4000 / 3)
    assert all(isinstance(value, float) for value in scalars.values())
    assert "gates/cls.0.depth/L0" in filled(ComputeMeter()).compute().as_scalars()
    assert "gates/cls.0.depth/fine" in filled(ComputeMeter(level_names=["fine", "coarse"])).compute().as_scalars()
    meter = ComputeMeter()
    meter.update(None, [{"head": 40.5e9, "backbone": 60e9}, {"head": 20e9, "backbone": 60e9}])
    assert meter.compute().as_table() == [
        {"GMAC": "head", "mean": "30.250", "max": "40.500", "min": "20.000"},
        {"GMAC": "total", "mean": "90.250", "max": "100.500", "min": "80.000"},
    ]


def test_no_images_is_nan_and_reset_forgets() -> None:
    meter = filled(ComputeMeter())
    meter.reset()
    report = meter.compute()
    assert report.images == 0 and not report.open
    assert all(math.isnan(value) for value in (report.head.mean, report.total.max, report.ratio, report.ratio_of_sums))


def test_disagreeing_batch_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="routing has 2 images, static costs have 1"):
        ComputeMeter().update(routing([1, 1], [1, 1]), [STATIC])


def _process(rank: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    meter = ComputeMeter(strides=(8, 16))
    if rank == 0:  # the other process saw no image
        filled(meter)
    results[rank] = meter.compute()
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    expected: ComputeReport = filled(ComputeMeter(strides=(8, 16))).compute()
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(_process, (str(tmp_path / "store"), results), nprocs=2, start_method="fork")  # type: ignore[attr-defined]
        assert results[0] == results[1] == expected
