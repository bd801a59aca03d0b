"""The sparse operations by the Triton kernels, without autograd: the one door to `dyndet.kernels`.

The same functions as `torch_backend`. Nothing reads a value, so that a CUDA graph can be captured of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

import dyndet.kernels as kernels  # pyright: ignore[reportMissingImports]  # lies outside src
from dyndet.layout import RowLayout
from dyndet.ops.sparse.group_norm import Norm
from dyndet.ops.sparse.plan import Plan
from dyndet.ops.sparse.tables import neighbours, segment


def plan(gate: Tensor, valid: Tensor | None, layout: RowLayout, reaches: Sequence[int], exact: bool) -> list[Tensor]:
    """See `torch_backend.plan`; always of capacity P, its spare positions undefined."""
    found = kernels.plan(gate, valid, neighbours(layout), segment(layout), layout.segments, reaches)
    return [tensor.clone() for trio in found for tensor in trio]  # results of an operator must not overlap


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    source: Plan,
    target: Plan,
    impl: str,
    tf32: bool,
    norm: Norm | None = None,
    relu: bool = False,
) -> Tensor:
    """See `torch_backend.conv`; `norm` is taken of every position by itself, in the same launch."""
    where = target.positions, None if source.whole else source.inverse, neighbours(target.layout), target.offsets
    if weight.shape[1] < x.shape[1]:
        return kernels.depthwise(x, weight, bias, *where)
    fused = None if norm is None else kernels.PositionNorm(norm.scale, norm.shift, norm.groups, norm.eps, relu)
    return kernels.conv(x, weight, bias, *where, norm=fused, tf32=tf32, density=target.density)


def conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, source: Plan, target: Plan, needs: Sequence[bool], impl: str, tf32: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See `torch_backend.conv_backward`."""
    layout, run, run_weight = target.layout, kernels.depthwise, kernels.depthwise_weight_grad
    if weight.shape[1] == x.shape[1]:
        run = partial(kernels.conv, tf32=tf32)
        run_weight = partial(kernels.conv_weight_grad, tf32=tf32, density=target.density)
    table, grad_x, grad_weight, grad_bias = neighbours(layout), None, None, None
    if needs[0] and source.whole:  # only positions near an active one receive anything
        active = target.inverse[:-1] < target.capacity
        ((positions, _, offsets),) = kernels.plan(active, None, table, segment(layout), layout.segments, [1])
        grad_x = run(grad, weight, None, positions, target.inverse, table, offsets, transposed=True, scatter=True)
    elif needs[0]:
        grad_x = run(grad, weight, None, source.positions, target.inverse, table, source.offsets, transposed=True)
    if needs[1] or needs[2]:
        where = target.positions, None if source.whole else source.inverse, table, target.offsets
        grad_weight, grad_bias = run_weight(x, grad, *where)
        grad_bias = grad_bias.clone()  # an operator must not return parts of one buffer
    return grad_x, grad_weight if needs[1] else None, grad_bias if needs[2] else None


def tile_rows(x: Tensor, weight: Tensor, target: Plan, *, tf32: bool) -> int:
    """Rows that `conv` computes at once."""
    return kernels.tile_rows(x, weight, target.layout.positions, target.density, tf32=tf32)


def group_norm(x: Tensor, norm: Norm, plan: Plan, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See `torch_backend.group_norm`."""
    scale, shift, groups, eps, stats = norm
    return kernels.group_norm(x, scale, shift, plan.offsets, groups=groups, eps=eps, stats=stats, relu=relu)


def group_norm_backward(
    grad: Tensor, x: Tensor, y: Tensor | None, norm: Norm, mean: Tensor, rstd: Tensor, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """See `torch_backend.group_norm_backward`."""
    of_x, of_scale, of_shift = kernels.group_norm_backward(
        grad, x, y, norm.scale, mean, rstd, plan.offsets, stats=norm.stats
    )
    return of_x, of_scale.clone(), of_shift  # two halves of one buffer


def scatter_add(
    x: Tensor, norm: Norm, gate: Tensor, residual: Tensor | None, plan: Plan, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `torch_backend.scatter_add`; the backward direction takes normalised rows again, so there are none."""
    scale, shift, groups, eps, stats = norm
    where, options = (plan.inverse, segment(plan.layout), plan.offsets), {"groups": groups, "eps": eps, "stats": stats}
    y, mean, rstd = kernels.scatter_add(x, scale, shift, gate, residual, *where, **options, relu=relu)
    return y, x.new_empty(0), mean, rstd


def scatter_add_backward(
    grad: Tensor, outputs: Sequence[Tensor], x: Tensor, norm: Norm, gate: Tensor, plan: Plan, relu: bool, residual: bool
) -> tuple[Tensor | None, ...]:
    """See `torch_backend.scatter_add_backward`."""
    y, _, *statistics = outputs
    scale, shift, _, _, stats = norm
    where, options = (plan.positions, plan.offsets), {"stats": stats, "residual": residual}
    of_residual, of_x, of_scale, of_shift, of_gate = kernels.scatter_add_backward(
        grad, y if relu else None, x, scale, shift, *statistics, gate, *where, **options
    )
    if of_residual is grad:
        of_residual = grad.clone()
    return of_x, of_scale.clone(), of_shift, of_gate, of_residual
