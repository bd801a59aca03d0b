"""Necks: what they sum, their extra levels, published figures."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dyndet.models.necks.fpn import FPN


def test_fpn_sums_from_coarse_to_fine() -> None:
    neck = FPN([2, 3], [8, 16], channels=4, extra_levels=0)
    for conv in neck.lateral:
        nn.init.constant_(conv.weight, 1.0)  # type: ignore[arg-type]
    for conv in neck.output:
        nn.init.dirac_(conv.weight)  # type: ignore[arg-type]
    fine, coarse = torch.full((1, 2, 5, 7), 1.0), torch.full((1, 3, 3, 4), 10.0)
    outputs = neck([fine, coarse])
    assert torch.equal(outputs[0], torch.full((1, 4, 5, 7), 2.0 + 30.0))
    assert torch.equal(outputs[1], torch.full((1, 4, 3, 4), 30.0))


@pytest.mark.parametrize("source", ["C5", "P5"])
@pytest.mark.parametrize("relu", [True, False])
def test_fpn_extra_levels(source: str, relu: bool) -> None:
    torch.manual_seed(0)
    neck = FPN([2, 3], [8, 16], channels=4, extra_source=source, relu_before_extra=relu)  # type: ignore[arg-type]
    assert neck.strides == [8, 16, 32, 64]
    features = [torch.randn(1, 2, 8, 8), torch.randn(1, 3, 4, 4)]
    outputs = neck(features)
    p6 = neck.extra[0](features[-1] if source == "C5" else outputs[1])
    p7 = neck.extra[1](p6.relu() if relu else p6)
    assert torch.equal(outputs[2], p6) and torch.equal(outputs[3], p7)
