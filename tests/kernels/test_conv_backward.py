"""Gradients of the convolution against float64 autograd through the dense one."""

from __future__ import annotations

import pytest
import torch
from pyramid import DTYPES, SMALL, TOLERANCE, Pyramid, assert_close, poisoned, random, random_gate

from dyndet import kernels


def dense_gradients(
    pyramid: Pyramid, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, groups: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of sum(grad * conv(x)), all (P, C) whole maps, with respect to x, weight and bias."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    bias = weight.new_zeros(len(weight), requires_grad=True)
    out = pyramid.conv(x, weight, bias, groups)
    return torch.autograd.grad(out, (x, weight, bias), grad.double())


def rows_of(plan: kernels.Plan, dense: torch.Tensor) -> torch.Tensor:
    return dense[plan.positions[: int(plan.offsets[-1])].long()]


def spread(plan: kernels.Plan, rows: torch.Tensor, total: int) -> torch.Tensor:
    dense = rows.new_zeros(total, rows.shape[1])
    dense[plan.positions[: len(rows)].long()] = rows
    return dense


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 40), (5, 3)])
def test_chain_of_two(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """x on the dilated plan, output on the plain one: all three gradients."""
    gate = random_gate(SMALL)
    wide, narrow = SMALL.plan(gate, reach=1), SMALL.plan(gate, reach=0)
    x = random(int(wide.offsets[-1]), inputs, dtype=dtype)
    grad = random(int(narrow.offsets[-1]), outputs, dtype=dtype, seed=1)
    weight = random(outputs, inputs, 3, 3, dtype=dtype, seed=2).div_(3 * inputs**0.5)
    expected = dense_gradients(SMALL, spread(wide, x, SMALL.total), weight, spread(narrow, grad, SMALL.total))

    x_rows, grad_rows = poisoned(x, SMALL.total), poisoned(grad, SMALL.total)
    weight_grad, bias_grad = kernels.conv_weight_grad(
        x_rows, grad_rows, narrow.positions, wide.inverse, SMALL.neighbours, narrow.offsets
    )
    assert weight_grad.dtype == bias_grad.dtype == torch.float32
    assert_close(weight_grad, expected[1], 1e-5)
    assert_close(bias_grad, expected[2], 1e-5)
    x_grad = kernels.conv(
        grad_rows, weight, None, wide.positions, narrow.inverse, SMALL.neighbours, wide.offsets, transposed=True
    )
    assert_close(x_grad[: len(x)], rows_of(wide, expected[0]), TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["empty", "one", "full"])
def test_masks_and_whole_map(kind: str) -> None:
    gate = torch.zeros_like(random_gate(SMALL))
    gate[{"empty": slice(0), "one": slice(40, 41), "full": slice(None)}[kind]] = 1
    plan = SMALL.plan(gate, reach=0)
    x = random(SMALL.total, 16)
    grad = random(int(plan.offsets[-1]), 16, seed=1)
    weight = random(16, 16, 3, 3, seed=2)
    expected = dense_gradients(SMALL, x, weight, spread(plan, grad, SMALL.total))
    arguments = (plan.positions, None, SMALL.neighbours, plan.offsets)
    weight_grad, bias_grad = kernels.conv_weight_grad(
        poisoned(x, SMALL.total), poisoned(grad, SMALL.total), *arguments, density=1.0
    )
    assert_close(weight_grad, expected[1], 1e-5)
    assert_close(bias_grad, expected[2], 1e-5)
    # The gradient towards a whole map is dense: every position is an output, placed or not.
    everything = SMALL.plan(torch.ones_like(gate), reach=0)
    x_grad = kernels.conv(
        poisoned(grad, SMALL.total),
        weight,
        None,
        everything.positions,
        plan.inverse,
        SMALL.neighbours,
        everything.offsets,
        transposed=True,
    )
    assert_close(x_grad[: SMALL.total], expected[0], TOLERANCE[torch.float32])


def test_expanded_gradient() -> None:
    """What sum().backward() hands in."""
    plan = SMALL.plan(torch.ones(SMALL.total), reach=0)
    x = random(SMALL.total, 16)
    grad = torch.ones(1, 1, device=x.device).expand(SMALL.total + 1, 16)
    _, bias_grad = kernels.conv_weight_grad(
        poisoned(x, SMALL.total), grad, plan.positions, None, SMALL.neighbours, plan.offsets
    )
    assert bias_grad.tolist() == [SMALL.total] * 16


def test_rounded_to_tensor_cores() -> None:
    """TF32 keeps 10 bits of a value, the sums stay float32; the interpreter does not round at all."""
    plan = SMALL.plan(random_gate(SMALL), reach=0)
    x, weight = random(SMALL.total, 24), random(40, 24, 3, 3, seed=2)
    grad = random(int(plan.offsets[-1]), 40, seed=1)
    expected = dense_gradients(SMALL, x, weight, spread(plan, grad, SMALL.total))
    arguments = (plan.positions, None, SMALL.neighbours, plan.offsets)
    rows, grad_rows = poisoned(x, SMALL.total), poisoned(grad, SMALL.total)
    out = kernels.conv(rows, weight, None, *arguments, tf32=True)
    assert_close(out[: len(grad)], rows_of(plan, SMALL.conv(x.double(), weight.double())), 2e-3)
    weight_grad, bias_grad = kernels.conv_weight_grad(rows, grad_rows, *arguments, tf32=True)
    assert_close(weight_grad, expected[1], 2e-3)
    assert_close(bias_grad, expected[2], 1e-5)
