"""Depthwise convolution and its gradients against dense float64."""

from __future__ import annotations

import pytest
import torch
from pyramid import DTYPES, SMALL, TOLERANCE, assert_close, poisoned, random, random_gate
from test_conv_backward import dense_gradients, rows_of, spread

from dyndet import kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [32, 88, 130])
def test_forward(channels: int, dtype: torch.dtype) -> None:
    plan = SMALL.plan(random_gate(SMALL), reach=0)
    x = random(SMALL.total, channels, dtype=dtype)
    weight, bias = random(channels, 1, 3, 3, seed=1, dtype=dtype), random(channels, seed=2, dtype=dtype)
    out = kernels.depthwise(
        poisoned(x, SMALL.total), weight, bias, plan.positions, None, SMALL.neighbours, plan.offsets
    )
    dense = SMALL.conv(x.double(), weight.double(), bias.double(), groups=channels)
    assert_close(out[: int(plan.offsets[-1])], rows_of(plan, dense), TOLERANCE[dtype])


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_place(density: float) -> None:
    plan = SMALL.plan(random_gate(SMALL, density), reach=0)
    x = random(SMALL.total, 16)
    weight = random(16, 1, 3, 3, seed=1)
    arguments = (plan.positions, None, SMALL.neighbours, plan.offsets)
    out = kernels.depthwise(poisoned(x, SMALL.total), weight, None, *arguments, scatter=True)
    dense = SMALL.conv(x.double(), weight.double(), groups=16)
    expected = spread(plan, rows_of(plan, dense), SMALL.total + 1)
    assert_close(out, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [16, 130])
def test_backward(channels: int, dtype: torch.dtype) -> None:
    gate = random_gate(SMALL)
    wide, narrow = SMALL.plan(gate, reach=1), SMALL.plan(gate, reach=0)
    x = random(int(wide.offsets[-1]), channels, dtype=dtype)
    grad = random(int(narrow.offsets[-1]), channels, dtype=dtype, seed=1)
    weight = random(channels, 1, 3, 3, dtype=dtype, seed=2)
    dense = (spread(wide, x, SMALL.total), weight, spread(narrow, grad, SMALL.total))
    expected = dense_gradients(SMALL, *dense, groups=channels)
    x_rows, grad_rows = poisoned(x, SMALL.total), poisoned(grad, SMALL.total)
    weight_grad, bias_grad = kernels.depthwise_weight_grad(
        x_rows, grad_rows, narrow.positions, wide.inverse, SMALL.neighbours, narrow.offsets
    )
    assert_close(weight_grad, expected[1], 1e-5)
    assert_close(bias_grad, expected[2], 1e-5)
    x_grad = kernels.depthwise(
        grad_rows, weight, None, wide.positions, narrow.inverse, SMALL.neighbours, wide.offsets, transposed=True
    )
    assert_close(x_grad[: len(x)], rows_of(wide, expected[0]), TOLERANCE[dtype])
