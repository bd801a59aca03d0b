"""Every weight trains in every step, whatever the batch holds: processes wait for each other's gradients."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_detectors import HEADS, ONE_STAGE, TWO_STAGE, targets, tiny
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector

from dyndet.models.detectors.pyramid import PyramidDetector
from dyndet.models.detectors.two_stage import TwoStageDetector
from dyndet.structures import Target


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("predictor", ONE_STAGE + TWO_STAGE)
def test_every_weight_has_a_gradient(head: str, predictor: str) -> None:
    torch.manual_seed(0)
    detector = tiny(head, predictor)
    for count in (2, 0):
        detector.zero_grad()
        total = detector.losses(torch.rand(2, 3, 64, 64), targets(count)).total
        total.backward()
        assert total.isfinite()
        assert [
            name for name, weight in detector.named_parameters() if weight.requires_grad and weight.grad is None
        ] == []


@pytest.mark.parametrize("predictor", TWO_STAGE)
def test_so_it_has_without_a_single_region(predictor: str) -> None:
    detector = tiny("none", predictor)
    assert isinstance(detector, TwoStageDetector)
    detector.rpn.proposals = lambda raw, *_: [torch.zeros(0, 4)] * len(raw[0]["deltas"])  # type: ignore[method-assign]
    total = detector.losses(torch.rand(2, 3, 64, 64), targets(0)).total
    total.backward()
    assert total.isfinite() and all(p.grad is not None for p in detector.parameters())


class Step(torch.nn.Module):
    """What a process wraps: its forward pass is the loss."""

    def __init__(self, detector: PyramidDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: torch.Tensor, wanted: list[Target]) -> torch.Tensor:
        return self.detector.losses(images, wanted).total


PAIRS = [
    ("plain_small", "yolo_p5_small"), ("fixed_small", "faster_rcnn_small"), ("fine_grained_small", "yolo_p5_small"),
    ("dyhead_fine_grained_small", "cascade_rcnn"), ("separable_small", "mask_rcnn_small"),
]  # fmt: skip


def train_in_process(rank: int, store: str, results: dict[int, list[bool]]) -> None:
    """Two steps for every pair; the first process has objects, the other one none."""
    torch.set_num_threads(1)
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=wait)
    same = []
    for head, predictor in PAIRS:
        torch.manual_seed(0)
        step = DistributedDataParallel(Step(tiny(head, predictor)))
        before = parameters_to_vector(step.parameters()).detach()
        optimizer = torch.optim.SGD(step.parameters(), lr=1e-4)
        torch.manual_seed(rank)
        for _ in range(2):
            optimizer.zero_grad()
            step(torch.rand(2, 3, 64, 64), targets(0 if rank else 2)).backward()
            optimizer.step()
        after = parameters_to_vector(step.parameters()).detach()
        both = [torch.empty_like(after) for _ in range(2)]
        dist.all_gather(both, after)
        same.append(torch.equal(*both) and bool(after.isfinite().all()) and not torch.equal(before, after))
    results[rank] = same
    dist.destroy_process_group()


def test_processes_train_what_a_predictor_of_one_branch_reads(tmp_path: Path) -> None:
    with mp.Manager() as manager:
        results = manager.dict()
        arguments = (str(tmp_path / "store"), results)
        mp.start_processes(train_in_process, arguments, nprocs=2, start_method="fork")  # type: ignore[attr-defined]
        assert dict(results) == {0: [True] * len(PAIRS), 1: [True] * len(PAIRS)}
