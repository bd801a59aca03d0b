"""Normalise, gate, scatter, add, activate: against float64, with all gradients."""

from __future__ import annotations

import pytest
import torch
from pyramid import DTYPES, SMALL, Pyramid, assert_close, poisoned, random, random_gate
from test_group_norm import EPS, TOLERANCE, affine, expected_norm

from dyndet import kernels

TINY = Pyramid(((3, 1), (1, 1), (1, 1), (1, 1)), batch=15)  # several segments in the run of one program


def expected_sum(
    plan: kernels.Plan, normal: torch.Tensor, gate: torch.Tensor, residual: torch.Tensor | None, total: int
) -> torch.Tensor:
    """(P, C) float64, before the activation."""
    where = plan.positions[: len(normal)].long()
    base = normal.new_zeros(total, normal.shape[1]) if residual is None else residual
    return base.index_add(0, where, gate[where, None] * normal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stats", ["active", "position"])
@pytest.mark.parametrize(("with_residual", "relu"), [(True, True), (True, False), (False, True), (False, False)])
def test_both_ways(with_residual: bool, relu: bool, stats: kernels.Stats, dtype: torch.dtype) -> None:
    channels, groups, total = 24, 3, SMALL.total
    gate = random_gate(SMALL, 0.6)
    plan = SMALL.plan(gate, reach=0)
    count = int(plan.offsets[-1])
    x, grad = random(count, channels, dtype=dtype) * 2 + 1, random(total, channels, seed=1, dtype=dtype)
    residual = random(total, channels, seed=2, dtype=dtype) if with_residual else None
    weight, bias = affine(channels)

    leaves = [leaf.double().requires_grad_() for leaf in (x, weight, bias, gate)]
    base = None if residual is None else residual.double().requires_grad_()
    normal = expected_norm(plan, leaves[0], leaves[1], leaves[2], groups, stats)
    linear = expected_sum(plan, normal, leaves[3], base, total)

    rows = poisoned(x, total)
    around = (plan.inverse, SMALL.segment, plan.offsets)
    poisoned_gate = torch.where(gate > 0, gate, float("nan"))
    y, mean, rstd = kernels.scatter_add(
        rows,
        weight,
        bias,
        poisoned_gate,
        None if residual is None else poisoned(residual, total),
        *around,
        groups=groups,
        eps=EPS,
        stats=stats,
        relu=relu,
    )
    expected = (linear.relu() if relu else linear).detach()
    assert_close(y[:total], expected, TOLERANCE[dtype])
    assert not y[total].any()

    slope = grad.double() * (y[:total] > 0) if relu else grad.double()
    gradients = torch.autograd.grad(linear, leaves if base is None else [*leaves, base], slope)
    actual = kernels.scatter_add_backward(
        poisoned(grad, total),
        poisoned(y[:total], total) if relu else None,
        rows,
        weight,
        bias,
        mean,
        rstd,
        poisoned_gate,
        plan.positions,
        plan.offsets,
        stats=stats,
        residual=with_residual,
    )
    if base is None:
        assert actual[0] is None
    else:
        assert actual[0] is not None
        assert_close(actual[0][:total], gradients[4], TOLERANCE[dtype])
    assert_close(actual[1][:count], gradients[0], max(TOLERANCE[dtype], 1e-5))
    assert_close(actual[2], gradients[1], 1e-5)
    assert_close(actual[3], gradients[2], 1e-5)
    assert_close(actual[4], gradients[3], 1e-5)


@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("pyramid", [SMALL, TINY])
def test_masks_and_many_segments(pyramid: Pyramid, density: float) -> None:
    plan = pyramid.plan(random_gate(pyramid, density), reach=1)
    count = int(plan.offsets[-1])
    gate = random(pyramid.total, seed=9)
    x, residual = random(count, 16), random(pyramid.total, 16, seed=2)
    weight, bias = affine(16)
    y, mean, rstd = kernels.scatter_add(
        poisoned(x, pyramid.total),
        weight,
        bias,
        gate,
        poisoned(residual, pyramid.total),
        *(plan.inverse, pyramid.segment, plan.offsets),
        groups=2,
        eps=EPS,
        stats="active",
        relu=False,
    )
    normal = expected_norm(plan, x.double(), weight.double(), bias.double(), 2, "active")
    expected = expected_sum(plan, normal, gate.double(), residual.double(), pyramid.total)
    assert_close(y[: pyramid.total], expected, 1e-5)
    assert mean.isfinite().all() and rstd.isfinite().all()
