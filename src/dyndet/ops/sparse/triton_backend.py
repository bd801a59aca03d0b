"""The sparse operations by the Triton kernels, without autograd: the one door to `dyndet.kernels`.

The functions of `torch_backend`, and `conv_norm` and `tile_rows`. Nothing reads a value, so that a CUDA graph can be
captured of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

import dyndet.kernels as kernels
from dyndet.layout import RowLayout
from dyndet.ops.sparse.conv import Layer
from dyndet.ops.sparse.group_norm import RowNorm
from dyndet.ops.sparse.operator import Gradients
from dyndet.ops.sparse.plan import Plan
from dyndet.ops.sparse.tables import neighbours, segment


def plan(gate: Tensor, valid: Tensor | None, layout: RowLayout, reaches: Sequence[int], exact: bool) -> list[Tensor]:
    """See `torch_backend.plan`; never exact, spare positions undefined."""
    return list(kernels.stacked_plans(gate, valid, neighbours(layout), segment(layout), layout.segments, reaches))


def conv(x: Tensor, layer: Layer) -> Tensor:
    """See `torch_backend.conv`."""
    weight, bias, source, target, tf32, _ = layer
    if weight.shape[1] < x.shape[1]:
        return kernels.depthwise(x, weight, bias, *_where(source, target))
    return kernels.conv(x, weight, bias, *_where(source, target), tf32=tf32, density=target.density)


def conv_norm(x: Tensor, layer: Layer, how: RowNorm) -> Tensor:
    """`conv` and a norm of every position by itself, in one launch."""
    weight, bias, source, target, tf32, _ = layer
    fused = kernels.PositionNorm(how.norm.scale, how.norm.shift, how.norm.groups, how.norm.eps, how.relu)
    return kernels.conv(x, weight, bias, *_where(source, target), norm=fused, tf32=tf32, density=target.density)


def conv_backward(grad: Tensor, needs: Sequence[bool], _: object, x: Tensor, layer: Layer) -> Gradients:
    """See `torch_backend.conv_backward`."""
    weight, _, source, target, tf32, _ = layer
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
        grad_weight, grad_bias = run_weight(x, grad, *_where(source, target))
        grad_bias = grad_bias.clone() if needs[2] else None  # an operator must not return parts of one buffer
    return grad_x, grad_weight, grad_bias


def _where(source: Plan, target: Plan) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    return target.positions, None if source.whole else source.inverse, neighbours(target.layout), target.offsets


def tile_rows(x: Tensor, weight: Tensor, target: Plan, *, tf32: bool) -> int:
    """Rows that `conv` computes at once."""
    return kernels.tile_rows(x, weight, target.layout.positions, target.density, tf32=tf32)


def group_norm(x: Tensor, how: RowNorm) -> tuple[Tensor, Tensor, Tensor]:
    """See `torch_backend.group_norm`."""
    scale, shift, groups, eps, stats = how.norm
    return kernels.group_norm(x, scale, shift, how.plan.offsets, groups=groups, eps=eps, stats=stats, relu=how.relu)


def group_norm_backward(grad: Tensor, _: object, outputs: Sequence[Tensor], x: Tensor, how: RowNorm) -> Gradients:
    """See `torch_backend.group_norm_backward`."""
    y, mean, rstd = outputs
    of_x, of_scale, of_shift = kernels.group_norm_backward(
        grad, x, y if how.relu else None, how.norm.scale, mean, rstd, how.plan.offsets, stats=how.norm.stats
    )
    return of_x, of_scale.clone(), of_shift  # two halves of one buffer


def scatter_add(
    x: Tensor, how: RowNorm, gate: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `torch_backend.scatter_add`; the backward direction takes normalised rows again, so there are none."""
    (scale, shift, groups, eps, stats), plan, relu = how
    where, options = (plan.inverse, segment(plan.layout), plan.offsets), {"groups": groups, "eps": eps, "stats": stats}
    y, mean, rstd = kernels.scatter_add(x, scale, shift, gate, residual, *where, **options, relu=relu)
    return y, x.new_empty(0), mean, rstd


def scatter_add_backward(
    grad: Tensor, _: object, outputs: Sequence[Tensor], x: Tensor, how: RowNorm, gate: Tensor, residual: Tensor | None
) -> Gradients:
    """See `torch_backend.scatter_add_backward`."""
    (scale, shift, _, _, stats), plan, relu = how
    y, _, mean, rstd = outputs
    where = (plan.positions, plan.offsets)
    of_residual, of_x, of_scale, of_shift, of_gate = kernels.scatter_add_backward(
        grad, y if relu else None, x, scale, shift, mean, rstd, gate, *where, stats=stats, residual=residual is not None
    )
    return of_x, of_scale.clone(), of_shift, of_gate, grad.clone() if of_residual is grad else of_residual
