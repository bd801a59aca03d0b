"""GroupNorm of rows and its gradients against float64 on the rows of each segment."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pyramid import DEVICE, DTYPES, SMALL, Pyramid, assert_close, poisoned, random, random_gate

from dyndet import kernels

# Statistics are float32 whatever the rows: the output's rounding is what is left.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
EPS = 1e-5


def expected_norm(
    plan: kernels.Plan, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, stats: kernels.Stats
) -> torch.Tensor:
    """(N, C) float64: torch's own GroupNorm, once per segment or once for all rows."""
    if stats == "position":
        return F.group_norm(x, groups, weight, bias, EPS)
    sizes = plan.offsets.diff().tolist()
    parts = [F.group_norm(part.t()[None], groups, weight, bias, EPS)[0].t() for part in x.split(sizes) if len(part)]
    return torch.cat(parts) if parts else x


def affine(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    return random(channels, seed=3) + 1, random(channels, seed=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stats", ["active", "position"])
@pytest.mark.parametrize(("channels", "groups", "relu"), [(32, 4, True), (24, 3, False), (22, 2, True)])
def test_both_ways(channels: int, groups: int, relu: bool, stats: kernels.Stats, dtype: torch.dtype) -> None:
    plan = SMALL.plan(random_gate(SMALL, 0.6), reach=0)
    count = int(plan.offsets[-1])
    x, grad = random(count, channels, dtype=dtype) * 2 + 1, random(count, channels, seed=1, dtype=dtype)
    weight, bias = affine(channels)
    leaves = [leaf.double().requires_grad_() for leaf in (x, weight, bias)]
    expected = expected_norm(plan, leaves[0], leaves[1], leaves[2], groups, stats)
    expected = expected.relu() if relu else expected

    rows = poisoned(x, SMALL.total)
    y, mean, rstd = kernels.group_norm(rows, weight, bias, plan.offsets, groups=groups, eps=EPS, stats=stats, relu=relu)
    assert_close(y[:count], expected.detach(), TOLERANCE[dtype])
    assert mean.shape == rstd.shape == (SMALL.total if stats == "position" else SMALL.segments, groups)

    # Where the rounded output is zero the exact one is as good as zero: both masks are the kernel's.
    slope = grad.double() * (y[:count] > 0) if relu else grad.double()
    linear = expected_norm(plan, leaves[0], leaves[1], leaves[2], groups, stats)
    gradients = torch.autograd.grad(linear, leaves, slope)
    clipped = poisoned(y[:count], SMALL.total) if relu else None
    actual = kernels.group_norm_backward(
        poisoned(grad, SMALL.total), rows, clipped, weight, mean, rstd, plan.offsets, stats=stats
    )
    assert_close(actual[0][:count], gradients[0], max(TOLERANCE[dtype], 1e-5))
    assert_close(actual[1], gradients[1], 1e-5)
    assert_close(actual[2], gradients[2], 1e-5)


@pytest.mark.parametrize("stats", ["active", "position"])
def test_large_mean(stats: kernels.Stats) -> None:
    """Mean 100 standard deviations away: E[x^2] - E[x]^2 in float32 would be wrong in the third digit."""
    pyramid = Pyramid(((13, 17),), 1)
    plan = pyramid.plan(torch.ones(pyramid.total), reach=0)
    x = random(pyramid.total, 16) + 100
    weight, bias = affine(16)
    y, _, rstd = kernels.group_norm(
        poisoned(x, pyramid.total), weight, bias, plan.offsets, groups=2, eps=EPS, stats=stats, relu=False
    )
    expected = expected_norm(plan, x.double(), weight.double(), bias.double(), 2, stats)
    assert_close(y[: pyramid.total], expected, 2e-5)
    if stats == "active":
        variance = x.double().view(-1, 2, 8).permute(1, 0, 2).reshape(2, -1).var(1, correction=0)
        assert_close(rstd[0], (variance + EPS).rsqrt(), 1e-6)


@settings(max_examples=5, deadline=None)
@given(st.sampled_from(["empty", "one", "full", "level"]))
def test_masks(kind: str) -> None:
    gate = torch.zeros(SMALL.total, device=DEVICE)
    if kind == "one":
        gate[3] = 1
    elif kind == "full":
        gate[:] = 1
    elif kind == "level":
        gate[SMALL.segment == 3] = 1
    plan = SMALL.plan(gate, reach=0)
    count = int(plan.offsets[-1])
    x = random(count, 16)
    weight, bias = affine(16)
    y, mean, rstd = kernels.group_norm(
        poisoned(x, SMALL.total), weight, bias, plan.offsets, groups=2, eps=EPS, stats="active", relu=False
    )
    expected = expected_norm(plan, x.double(), weight.double(), bias.double(), 2, "active")
    assert_close(y[:count], expected, 1e-5)
    assert mean.isfinite().all() and rstd.isfinite().all()
    assert not mean[plan.offsets.diff() == 0].any()
    gradients = kernels.group_norm_backward(
        poisoned(x, SMALL.total),
        poisoned(x, SMALL.total),
        None,
        weight,
        mean,
        rstd,
        plan.offsets,
        stats="active",
    )
    assert gradients[0][:count].isfinite().all()
    assert_close(gradients[2], x.double().sum(0), 1e-5)
