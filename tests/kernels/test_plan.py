"""Plans against nonzero, on masks of every kind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyramid import DEVICE, SMALL, Pyramid, random_gate

from dyndet import kernels

PYRAMIDS = (SMALL, Pyramid(((1, 1),), 1), Pyramid(((6, 3), (2, 1)), 1))
KINDS = ("empty", "one", "full", "level", "random")


def gate_of(pyramid: Pyramid, kind: str, seed: int) -> torch.Tensor:
    gate = torch.zeros(pyramid.total)
    if kind == "one":
        gate[seed % pyramid.total] = 0.5
    elif kind == "full":
        gate[:] = 1
    elif kind == "level":
        gate[pyramid.segment.cpu() == seed % pyramid.segments] = 2
    elif kind == "random":
        gate = random_gate(pyramid, 0.4, seed).cpu() - 0.05
    return gate.to(DEVICE)


def check(pyramid: Pyramid, plan: kernels.Plan, active: torch.Tensor) -> None:
    expected = active.nonzero()[:, 0].cpu()
    count = int(plan.offsets[-1])
    assert plan.positions.shape == (pyramid.total,)
    assert plan.inverse.shape == (pyramid.total + 1,)
    assert plan.offsets.shape == (pyramid.segments + 1,)
    assert plan.positions[:count].tolist() == expected.tolist()
    inverse = torch.full((pyramid.total + 1,), pyramid.total)
    inverse[expected] = torch.arange(len(expected))
    assert plan.inverse.tolist() == inverse.tolist()
    per_segment = torch.bincount(pyramid.segment.cpu()[expected], minlength=pyramid.segments)
    assert plan.offsets.tolist() == [0, *per_segment.cumsum(0).tolist()]


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(PYRAMIDS), st.sampled_from(KINDS), st.integers(0, 99), st.booleans())
def test_both_reaches(pyramid: Pyramid, kind: str, seed: int, padded: bool) -> None:
    gate = gate_of(pyramid, kind, seed)
    valid = random_gate(pyramid, 0.7, seed + 1) > 0 if padded else None
    plans = kernels.plan(gate, valid, pyramid.neighbours, pyramid.segment, pyramid.segments, (0, 1))
    for plan, active in zip(plans, (gate > 0, pyramid.dilated(gate > 0)), strict=True):
        check(pyramid, plan, active if valid is None else active & valid)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.bfloat16, torch.float64])
def test_gate_dtypes(dtype: torch.dtype) -> None:
    gate = random_gate(SMALL)
    gate[3] = float("nan")  # not greater than zero
    gate = gate > 0 if dtype == torch.bool else gate.to(dtype)
    (plan,) = kernels.plan(gate, None, SMALL.neighbours, SMALL.segment, SMALL.segments, (1,))
    check(SMALL, plan, SMALL.dilated(gate > 0))


def test_many_blocks() -> None:
    pyramid = Pyramid(((41, 67), (20, 33)), 1)
    gate = random_gate(pyramid)
    dilated, plain = kernels.plan(gate, None, pyramid.neighbours, pyramid.segment, pyramid.segments, (1, 0))
    check(pyramid, plain, gate > 0)
    check(pyramid, dilated, pyramid.dilated(gate > 0))


def test_unknown_reach() -> None:
    with pytest.raises(ValueError, match="reaches"):
        kernels.plan(random_gate(SMALL), None, SMALL.neighbours, SMALL.segment, SMALL.segments, (2,))
