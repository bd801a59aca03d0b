"""From rows back to the map: normalise, gate, add the residual, clip; one pass, differentiable.

y[p] = act( residual[p] + gate[p] * norm(x[row of p]) )   where p is active
y[p] = act( residual[p] )                                 elsewhere; 0 without a residual
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyndet.ops.sparse.direct import direct
from dyndet.ops.sparse.execute import place as plain
from dyndet.ops.sparse.execute import triton
from dyndet.ops.sparse.execute.norm import Stats
from dyndet.ops.sparse.impl import Impl
from dyndet.ops.sparse.plan import Plan
from dyndet.ops.sparse.tables import segment


def place_rows(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, gate: Tensor, *, residual: Tensor | None = None,
    plan: Plan, stats: Stats = "active", eps: float = 1e-5, relu: bool = False, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Gated GroupNorm of rows, put where they belong on the map.

    Args:
        x: (capacity + 1, C), not yet normalised.
        num_groups: divides C.
        weight: (C,) scale of the norm.
        bias: (C,) shift of the norm.
        gate: (P,) what the normalised rows are multiplied by.
        residual: (P + 1, C) what they are added to, or None.
        plan: of the rows.
        stats: see `norm_rows`.
        eps: added to the variance.
        relu: clips the sum at 0.
        impl: execution.

    Returns:
        (P + 1, C), the last row zero, in the type of `x` (of the residual, where there is one).
    """
    kernels = triton.chosen(impl, x.device)
    plan.check(kernels)
    gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
    y, *_ = _place_rows(
        x, weight, bias, gate, residual, *plan.tensors, segment(plan.layout), num_groups, eps, stats, relu, kernels
    )
    return y


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, residual: Tensor | None, positions: Tensor,
    inverse: Tensor, offsets: Tensor, segment: Tensor, groups: int, eps: float, stats: str, relu: bool, kernels: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> map rows, normalised rows (nothing where they are rather taken again), mean, 1 / deviation."""
    if kernels:
        y, mean, rstd = triton.kernels().place(
            x, weight, bias, gate, residual, positions, inverse, segment, offsets,
            groups=groups, eps=eps, stats=stats, relu=relu,
        )  # fmt: skip
        return y, x.new_empty(0), mean, rstd
    return plain.place(
        x, weight, bias, gate, residual, positions, offsets,
        groups=groups, eps=eps, stats="position" if stats == "position" else "active", relu=relu,
    )  # fmt: skip


_registered = torch.library.custom_op("dyndet::place_rows", _forward, mutates_args=())


@_registered.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, residual: Tensor | None, positions: Tensor,
    inverse: Tensor, offsets: Tensor, segment: Tensor, groups: int, eps: float, stats: str, relu: bool, kernels: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows = len(positions) if stats == "position" else len(offsets) - 1
    mean = x.new_empty(rows, groups, dtype=torch.promote_types(x.dtype, torch.float32))
    like = x if residual is None else residual
    normal = x.new_empty(0) if kernels else torch.empty_like(x)
    return like.new_empty(len(inverse), x.shape[1]), normal, mean, torch.empty_like(mean)


def _gradient(
    grad: Tensor, y: Tensor | None, x: Tensor, normal: Tensor, weight: Tensor, bias: Tensor, mean: Tensor,
    rstd: Tensor, gate: Tensor, positions: Tensor, inverse: Tensor, offsets: Tensor, segment: Tensor, groups: int,
    stats: str, residual: bool, kernels: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> gradients of x, weight, bias, gate and the residual (empty without one)."""
    if kernels:
        grad_residual, grad_x, grad_weight, grad_bias, grad_gate = triton.kernels().place_backward(
            grad.contiguous(), y, x, weight, bias, mean, rstd, gate, positions, inverse, segment, offsets,
            groups=groups, stats=stats, relu=y is not None, residual=residual,
        )  # fmt: skip
        grad_weight = grad_weight.clone()  # half of the same buffer as the next
        if grad_residual is grad:
            grad_residual = grad.clone()
    else:
        grad_residual, grad_x, grad_weight, grad_bias, grad_gate = plain.place_backward(
            grad, y, x, normal, weight, mean, rstd, gate, positions, offsets,
            groups=groups, stats="position" if stats == "position" else "active", residual=residual,
        )  # fmt: skip
    return (
        grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), grad_gate.to(gate.dtype),
        x.new_empty(0) if grad_residual is None else grad_residual,
    )  # fmt: skip


_registered_gradient = torch.library.custom_op("dyndet::place_rows_backward", _gradient, mutates_args=())


@_registered_gradient.register_fake
def _(
    grad: Tensor, y: Tensor | None, x: Tensor, normal: Tensor, weight: Tensor, bias: Tensor, mean: Tensor,
    rstd: Tensor, gate: Tensor, positions: Tensor, inverse: Tensor, offsets: Tensor, segment: Tensor, groups: int,
    stats: str, residual: bool, kernels: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    like = (torch.empty_like(value) for value in (x, weight, weight, gate))
    return *like, grad.new_empty(grad.shape) if residual else x.new_empty(0)  # type: ignore[return-value]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, gate, residual, positions, inverse, offsets, segment, groups, _, stats, relu, kernels = inputs
    y, normal, mean, rstd = output
    ctx.mark_non_differentiable(normal, mean, rstd)
    ctx.save_for_backward(
        y if relu else None, x, normal, weight, bias, mean, rstd, gate, positions, inverse, offsets, segment
    )  # fmt: skip
    ctx.rest = groups, stats, residual is not None, kernels


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    gradient = _gradient if getattr(ctx, "direct", False) else _registered_gradient
    of_x, of_weight, of_bias, of_gate, of_residual = gradient(grad, *ctx.saved_tensors, *ctx.rest)
    return of_x, of_weight, of_bias, of_gate, of_residual if ctx.rest[2] else None, *[None] * 9


_registered.register_autograd(_backward, setup_context=_setup)
_place_rows = direct(_registered, _forward, _setup, _backward)
