"""The end of a sparse block: normalise, gate, scatter, add the residual, activate; one dense launch.

    y[p] = act(residual[p] + gate[p] norm(x)[inverse[p]])    where p is active,    act(residual[p]) elsewhere

Every position is written exactly once, so nothing is cleared and nothing is scattered: a program owns a run of
positions and gathers the rows that exist. With statistics over segments a launch before it gathers partial moments
(see group_norm.py). Positions are sorted by segment: the run of a program is cut into its segments, the partials of
each are merged once, and the program that holds a segment's first position stores its statistics for the backward pass.
"""

# Device code: to the type checker constants are no numbers and constant branches are branches.
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .group_norm import ELEMENTS, Stats, channels_of, merge, moments, statistics, tile_shape
from .group_norm_backward import backward
from .launch import check_rows, run, target

# Positions of a program: enough to make up for merging the statistics.
RUN = 128


def scatter_add(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor,
    residual: Tensor | None,
    inverse: Tensor,
    segment: Tensor,
    offsets: Tensor,
    *,
    groups: int,
    eps: float,
    stats: Stats,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gated, normalised rows at their positions, on top of a residual. One launch, two with "active" statistics.

    Args:
        x: (P+1, C) float32, float16 or bfloat16.
        weight: (C,) scale.
        bias: (C,) shift.
        gate: (P,) float32, read at active positions.
        residual: (P+1, C) of the dtype of x, dense; None for zero.
        inverse: (P+1,) int32 of the plan of x.
        segment: (P,) int32.
        offsets: (S+1,) int32 of the plan of x.
        groups: divides C.
        eps: added to the (biased) variance.
        stats: as in `group_norm`.
        relu: act is a ReLU, otherwise the identity.

    Returns:
        (P+1, C) of the dtype of x, dense, the last row zero; mean and rstd as of `group_norm`.

    Raises:
        ValueError: on shapes or dtypes that do not fit.
    """
    x = check_rows(x)
    channels, total = x.shape[1], x.shape[0] - 1
    residual = None if residual is None else check_rows(residual, channels, like=x)
    if weight.shape[0] != channels:
        raise ValueError(f"weight must be ({channels},), got {tuple(weight.shape)}")
    segments = offsets.shape[0] - 1
    y = torch.empty_like(x)
    mean, rstd = statistics(segments if stats == "active" else total, groups, x.device)
    partial = moments(x, offsets, groups) if stats == "active" else None
    run(
        gated_rows,
        (triton.cdiv(total, RUN),),
        x,
        weight,
        bias,
        gate.float().contiguous(),
        residual,
        partial,
        inverse,
        segment,
        y,
        mean,
        rstd,
        eps,
        total,
        **tile_shape(channels, groups, ELEMENTS),
        splits=configs.splits(target(x.device), segments),
        relu=relu,
        length=RUN,
        num_warps=4,
    )
    return y, mean, rstd


def scatter_add_backward(
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gate: Tensor,
    positions: Tensor,
    offsets: Tensor,
    *,
    stats: Stats,
    residual: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `scatter_add`. Three launches, one to clear, one more with a ReLU and `residual`.

    Args:
        grad: (P+1, C) of the output, of the dtype of x.
        y: (P+1, C), what `scatter_add` returned where act was a ReLU; else None.
        x: (P+1, C), what `scatter_add` was given.
        weight: (C,).
        bias: (C,).
        mean: as `scatter_add` returned it.
        rstd: likewise.
        gate: (P,) float32.
        positions: (P,) int32 of the plan of x.
        offsets: (S+1,) int32.
        stats: as given to `scatter_add`.
        residual: whether there was one.

    Returns:
        (P+1, C) towards the residual, or None, its last row undefined; (P+1, C) towards x, undefined beyond the
        active rows; (C,) float32 towards weight and bias; (P,) float32 towards the gate, zero where not active.

    Raises:
        ValueError: on shapes or dtypes that do not fit.
    """
    x = check_rows(x, weight.shape[0])
    grad = check_rows(grad, x.shape[1], like=x)
    closed = None if y is None else check_rows(y, x.shape[1], like=x)
    residual_grad = None
    if residual:
        if closed is not None:
            grad = torch.ops.aten.threshold_backward(grad, closed, 0)
            closed = None  # the gradient is masked already
        residual_grad = grad
    gate_grad = torch.zeros(x.shape[0] - 1, dtype=torch.float32, device=x.device)
    factor = gate.float().contiguous()
    x_grad, weight_grad, bias_grad = backward(
        grad, x, closed, weight, bias, factor, mean, rstd, positions, gate_grad, offsets, stats
    )
    return residual_grad, x_grad, weight_grad, bias_grad, gate_grad


@triton.jit(do_not_specialize=["eps", "total"], do_not_specialize_on_alignment=["gate"])
def gated_rows(
    x,
    weight,
    bias,
    gate,
    residual,
    partial,
    inverse,
    segment,
    y,
    mean_out,
    rstd_out,
    eps,
    total,
    groups: tl.constexpr,
    group: tl.constexpr,
    wide: tl.constexpr,
    deep: tl.constexpr,
    block: tl.constexpr,
    splits: tl.constexpr,
    relu: tl.constexpr,
    length: tl.constexpr,
):
    first = tl.program_id(0) * length
    last = tl.minimum(first + length, total)
    channel, live = channels_of(groups, group, wide, deep)
    which = tl.arange(0, wide)
    scale = tl.load(weight + channel, mask=live, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=live, other=0.0).to(tl.float32)
    if first == 0:
        zeros = tl.zeros((1, wide, deep), tl.float32)
        tl.store(y + total.to(tl.int64) * (groups * group) + channel, zeros.to(y.dtype.element_ty), mask=live)

    low, high = 0, 0
    if partial is not None:
        low, high = tl.load(segment + first), tl.load(segment + last - 1)
        index = first + tl.arange(0, length)
        owner = tl.load(segment + index, mask=index < total, other=2147483647)
    for here in range(low, high + 1):
        begin, end = first, last
        if partial is not None:
            begin = first + tl.sum((owner < here).to(tl.int32))
            end = first + tl.sum((owner <= here).to(tl.int32))
            mean, variance = merge(partial, here, groups, wide, splits)
            rstd = tl.rsqrt(variance + eps)
            previous = tl.load(segment + begin - 1, mask=begin > 0, other=-1)
            if previous != here:
                tl.store(mean_out + here * groups + which, mean, mask=which < groups)
                tl.store(rstd_out + here * groups + which, rstd, mask=which < groups)
            mean, rstd = mean[None, :], rstd[None, :]
        for start in range(begin, end, block):
            position = start + tl.arange(0, block)
            inside = (position < end)[:, None, None] & live
            row = tl.load(inverse + position, mask=position < end, other=total)
            active = (row < total)[:, None, None] & live
            address = row.to(tl.int64)[:, None, None] * (groups * group) + channel
            value = tl.load(x + address, mask=active, other=0.0).to(tl.float32)
            if partial is None:
                mean = tl.sum(value, 2) / group
                centred = tl.where(live, value - mean[:, :, None], 0.0)
                rstd = tl.rsqrt(tl.sum(centred * centred, 2) / group + eps)
                row_groups = row[:, None] * groups + which[None, :]
                store = (row < total)[:, None] & (which < groups)[None, :]
                tl.store(mean_out + row_groups, mean, mask=store)
                tl.store(rstd_out + row_groups, rstd, mask=store)
            value = (value - mean[:, :, None]) * rstd[:, :, None] * scale + shift
            value *= tl.load(gate + position, mask=row < total, other=0.0)[:, None, None]
            value = tl.where(active, value, 0.0)
            address = position.to(tl.int64)[:, None, None] * (groups * group) + channel
            if residual is not None:
                value += tl.load(residual + address, mask=inside, other=0.0).to(tl.float32)
            if relu:
                value = tl.maximum(value, 0.0)
            tl.store(y + address, value.to(y.dtype.element_ty), mask=inside)
