"""The time of the head against that of its fixed twin."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor

import dyndet
from dyndet.models.detectors.base import routed_part
from dyndet.models.detectors.pyramid import PyramidDetector
from dyndet.models.heads.chain import HeadChain
from dyndet.models.heads.fine_grained import FineGrainedHead
from dyndet.models.heads.fixed import FixedHead
from dyndet.speeds import timing
from dyndet.structures import Batch, ImageBatch

SECONDS = {FineGrainedHead: 3.0, FixedHead: 4.0, HeadChain: 100.0}


@pytest.mark.parametrize(("experiment", "key"), [("shapes_dyn", "head"), ("shapes_dyhead_dyn", "head.towers")])
def test_head_and_twin_take_turns_on_the_same_features(
    experiment: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that only heads move."""
    torch.manual_seed(0)
    detector = cast(PyramidDetector, dyndet.build_detector(experiment, [f"{key}.depth=1"])).eval()
    head = cast(FineGrainedHead, routed_part(detector.head))
    now, seen = [0.0], []

    def count(module: torch.nn.Module, inputs: tuple[list[Tensor], object], output: object) -> None:
        if type(module) in SECONDS:
            now[0] += SECONDS[type(module)]  # type: ignore[index]
            seen.append((type(module), [x.clone() for x in inputs[0]]))

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    handle = torch.nn.modules.module.register_module_forward_hook(count)  # type: ignore[arg-type]
    batches = [Batch(ImageBatch.of(torch.rand(1, 3, 64, 64), 32), []) for _ in range(2)]
    try:
        found = timing.time_head(detector, batches, impl="gather", rounds=2)
    finally:
        handle.remove()
    assert (found.ratio, found.batches) == (0.75, 2)
    assert head.execute("auto") == "auto"  # as it was
    assert [kind for kind, _ in seen] == [FineGrainedHead, FixedHead] * 5  # a pair to warm up, two for each batch
    for (_, routed), (_, fixed) in zip(seen[::2], seen[1::2], strict=True):
        for a, b in zip(routed, fixed, strict=True):
            assert torch.equal(a, b)
