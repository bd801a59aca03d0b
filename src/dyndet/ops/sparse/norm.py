"""GroupNorm of rows, differentiable, with an optional ReLU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyndet.ops.sparse.direct import direct
from dyndet.ops.sparse.execute import norm as plain
from dyndet.ops.sparse.execute import triton
from dyndet.ops.sparse.execute.norm import Stats
from dyndet.ops.sparse.impl import Impl
from dyndet.ops.sparse.plan import Plan
from dyndet.ops.sparse.tables import segment


def norm_rows(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, *, plan: Plan, stats: Stats = "active",
    eps: float = 1e-5, relu: bool = False, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """GroupNorm whose statistics come from active rows alone; computed in float32.

    Args:
        x: (capacity + 1, C).
        num_groups: divides C.
        weight: (C,) scale.
        bias: (C,) shift.
        plan: of the rows.
        stats: "active" takes statistics over the active positions of an image and level, as GroupNorm does over a map;
            "position" takes them at each position over the group's channels, so that they depend on no other.
        eps: added to the variance.
        relu: clips the result at 0.
        impl: execution.

    Returns:
        (capacity + 1, C) in the type of `x`; rows from the plan's count on are undefined.
    """
    kernels = triton.chosen(impl, x.device)
    plan.check(kernels)
    return _norm_rows(
        x, weight, bias, plan.positions, segment(plan.layout), plan.offsets, num_groups, eps, stats, relu, kernels
    )[0]  # fmt: skip


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, segment: Tensor, offsets: Tensor, groups: int,
    eps: float, stats: str, relu: bool, kernels: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> normalised rows, mean, 1 / deviation."""
    if kernels:
        return triton.kernels().norm(
            x, weight, bias, positions, segment, offsets, groups=groups, eps=eps, stats=stats, relu=relu
        )
    return plain.norm(x, weight, bias, offsets, groups=groups, eps=eps, stats=_stats(stats), relu=relu)


_registered = torch.library.custom_op("dyndet::norm_rows", _forward, mutates_args=())


@_registered.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, segment: Tensor, offsets: Tensor, groups: int,
    eps: float, stats: str, *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = len(positions) if stats == "position" else len(offsets) - 1
    mean = x.new_empty(rows, groups, dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x), mean, torch.empty_like(mean)


def _gradient(
    grad: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor, positions: Tensor,
    segment: Tensor, offsets: Tensor, groups: int, stats: str, kernels: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> gradients of x, weight and bias."""
    if kernels:
        grads = triton.kernels().norm_backward(
            grad.contiguous(), x, y, weight, mean, rstd, positions, segment, offsets,
            groups=groups, stats=stats, relu=y is not None,
        )  # fmt: skip
        grads = grads[0], grads[1].clone(), grads[2]  # two halves of one buffer, which an operator must not return
    else:
        grads = plain.norm_backward(grad, x, y, weight, mean, rstd, offsets, groups=groups, stats=_stats(stats))
    return grads[0], grads[1].to(weight.dtype), grads[2].to(weight.dtype)


_registered_gradient = torch.library.custom_op("dyndet::norm_rows_backward", _gradient, mutates_args=())


@_registered_gradient.register_fake
def _(grad: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, positions, segment, offsets, groups, _, stats, relu, kernels = inputs
    y, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, y if relu else None, weight, mean, rstd, positions, segment, offsets)
    ctx.rest = groups, stats, kernels


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    gradient = _gradient if getattr(ctx, "direct", False) else _registered_gradient
    return (*gradient(grad, *ctx.saved_tensors, *ctx.rest), *[None] * 8)


_registered.register_autograd(_backward, setup_context=_setup)
_norm_rows = direct(_registered, _forward, _setup, _backward)


def _stats(name: str) -> Stats:
    return "position" if name == "position" else "active"
