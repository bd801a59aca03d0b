"""GroupNorm of rows, backward.

With n = (x - mean) rstd, g = dL/d(output before the ReLU) and averages E over what the statistics were taken of,

    dL/dweight = sum g n,  dL/dbias = sum g,  dL/dx = rstd (g w - E[g w] - n E[g w n])

The first launch walks over rows as the forward statistics do and writes per program the sums of g and g n, by channel
(for weight and bias) and, weighted, by group (for the averages). The second, organised alike, merges the group sums
of its segment once and computes dL/dx. Sums over programs in a fixed order: deterministic, no atomics.

Both kernels also serve `scatter_add`, whose gradients and outputs are dense and carry a gate: row n then reads position
positions[n] times gate.
"""

# Device code: to the type checker constants are no numbers and constant branches are branches.
# pyright: reportPossiblyUnboundVariable=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .group_norm import Stats, channels_of, tile_shape
from .launch import check_rows, run, target

# Elements of a tile: 16 per thread of the sums, which hold two of them, and 8 of dL/dx, where 16 make ptxas spill.
ELEMENTS = 2048


def group_norm_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    offsets: Tensor,
    *,
    stats: Stats,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `group_norm`. Three launches.

    Args:
        grad: (P+1, C) of the output, of the dtype of x.
        x: (P+1, C), what `group_norm` was given.
        y: (P+1, C), what it returned, where a ReLU was applied; else None.
        weight: (C,).
        mean: as `group_norm` returned it.
        rstd: likewise.
        offsets: (S+1,) int32.
        stats: as given to `group_norm`.

    Returns:
        (P+1, C) of the dtype of x, undefined beyond the active rows; (C,) float32 of the weight and of the bias.

    Raises:
        ValueError: on shapes or dtypes that do not fit.
    """
    x = check_rows(x, weight.shape[0])
    grad = check_rows(grad, x.shape[1], like=x)
    y = None if y is None else check_rows(y, x.shape[1], like=x)
    return backward(grad, x, y, weight, None, None, mean, rstd, None, None, offsets, stats)


def backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    positions: Tensor | None,
    gate_grad: Tensor | None,
    offsets: Tensor,
    stats: Stats,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both launches; y masks the gradient where it is not positive; bias, gate, positions are of `scatter_add`."""
    channels, groups = x.shape[1], mean.shape[1]
    segments, splits = offsets.shape[0] - 1, configs.splits(target(x.device), offsets.shape[0] - 1)
    shape = tile_shape(channels, groups, ELEMENTS)
    by_row = stats == "position"
    by_channel = torch.empty(segments * splits, 2, channels, dtype=torch.float32, device=x.device)
    by_group = None if by_row else by_channel.new_empty(segments, splits, 2, groups)
    x_grad = torch.empty_like(x)
    statistics = (mean, rstd, positions, offsets)
    run(
        gather_sums,
        (segments, splits),
        grad,
        x,
        y,
        weight,
        bias,
        gate,
        *statistics,
        by_channel,
        by_group,
        gate_grad,
        **shape,
        num_warps=4,
    )
    run(
        apply_backward,
        (segments, splits),
        grad,
        x,
        y,
        weight,
        gate,
        *statistics,
        by_group,
        x_grad,
        **shape,
        splits=splits,
        num_warps=8,
    )
    sums = by_channel.sum(0)
    return x_grad, sums[1], sums[0]


@triton.jit
def statistics_of(mean, rstd, row, inside, segment, by_row: tl.constexpr, groups: tl.constexpr, wide: tl.constexpr):
    """Mean and rstd, (block, wide, 1) by row or (1, wide, 1) of a segment."""
    which = tl.arange(0, wide)
    if by_row:
        index = row[:, None] * groups + which[None, :]
        live = inside[:, None] & (which < groups)[None, :]
    else:
        index = (segment * groups + which)[None, :]
        live = (which < groups)[None, :]
    centre = tl.load(mean + index, mask=live, other=0.0)
    spread = tl.load(rstd + index, mask=live, other=0.0)
    return centre[:, :, None], spread[:, :, None]


@triton.jit
def masked_gradient(grad, y, source, channels: tl.constexpr, channel, inside):
    """Gradient of rows `source` in float32, zero where the ReLU was closed."""
    address = source.to(tl.int64)[:, None, None] * channels + channel
    value = tl.load(grad + address, mask=inside, other=0.0).to(tl.float32)
    if y is not None:
        value = tl.where(tl.load(y + address, mask=inside, other=0.0).to(tl.float32) > 0.0, value, 0.0)
    return value


@triton.jit
def gather_sums(
    grad,
    x,
    y,
    weight,
    bias,
    gate,
    mean,
    rstd,
    positions,
    offsets,
    by_channel,
    by_group,
    gate_grad,
    groups: tl.constexpr,
    group: tl.constexpr,
    wide: tl.constexpr,
    deep: tl.constexpr,
    block: tl.constexpr,
):
    segment, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    end = tl.load(offsets + segment + 1)
    channel, live = channels_of(groups, group, wide, deep)
    scale = tl.load(weight + channel, mask=live, other=0.0).to(tl.float32)
    if gate is not None:
        shift = tl.load(bias + channel, mask=live, other=0.0).to(tl.float32)
    plain = tl.zeros((block, wide, deep), tl.float32)
    product = tl.zeros((block, wide, deep), tl.float32)
    for start in range(tl.load(offsets + segment) + split * block, end, splits * block):
        row = start + tl.arange(0, block)
        inside = (row < end)[:, None, None] & live
        source = row if positions is None else tl.load(positions + row, mask=row < end, other=0)
        value = tl.load(x + row.to(tl.int64)[:, None, None] * (groups * group) + channel, mask=inside, other=0.0)
        centre, spread = statistics_of(mean, rstd, row, row < end, segment, by_group is None, groups, wide)
        normal = tl.where(inside, (value.to(tl.float32) - centre) * spread, 0.0)
        slope = masked_gradient(grad, y, source, groups * group, channel, inside)
        if gate is not None:
            towards_gate = tl.sum(tl.sum(slope * (normal * scale + shift), 2), 1)
            tl.store(gate_grad + source, towards_gate, mask=row < end)
            slope *= tl.load(gate + source, mask=row < end, other=0.0)[:, None, None]
        plain += slope
        product += slope * normal
    plain_sum = tl.sum(plain, 0, keep_dims=True)
    product_sum = tl.sum(product, 0, keep_dims=True)
    program = segment * splits + split
    address = by_channel + program * 2 * (groups * group) + channel
    tl.store(address, plain_sum, mask=live)
    tl.store(address + groups * group, product_sum, mask=live)
    if by_group is not None:
        which = tl.arange(0, wide)[None, :]
        address = by_group + program * 2 * groups + which
        tl.store(address, tl.sum(plain_sum * scale, 2), mask=which < groups)
        tl.store(address + groups, tl.sum(product_sum * scale, 2), mask=which < groups)


@triton.jit
def apply_backward(
    grad,
    x,
    y,
    weight,
    gate,
    mean,
    rstd,
    positions,
    offsets,
    by_group,
    x_grad,
    groups: tl.constexpr,
    group: tl.constexpr,
    wide: tl.constexpr,
    deep: tl.constexpr,
    block: tl.constexpr,
    splits: tl.constexpr,
):
    segment, split = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(offsets + segment), tl.load(offsets + segment + 1)
    channel, live = channels_of(groups, group, wide, deep)
    scale = tl.load(weight + channel, mask=live, other=0.0).to(tl.float32)
    if by_group is not None:
        which = tl.arange(0, wide)[None, :]
        sums = by_group + (segment * splits + tl.arange(0, splits))[:, None] * 2 * groups + which
        size = tl.maximum((end - begin) * group, 1).to(tl.float32)
        plain = (tl.sum(tl.load(sums, mask=which < groups, other=0.0), 0) / size)[None, :, None]
        product = (tl.sum(tl.load(sums + groups, mask=which < groups, other=0.0), 0) / size)[None, :, None]
    for start in range(begin + split * block, end, splits * block):
        row = start + tl.arange(0, block)
        inside = (row < end)[:, None, None] & live
        source = row if positions is None else tl.load(positions + row, mask=row < end, other=0)
        address = row.to(tl.int64)[:, None, None] * (groups * group) + channel
        value = tl.load(x + address, mask=inside, other=0.0)
        centre, spread = statistics_of(mean, rstd, row, row < end, segment, by_group is None, groups, wide)
        normal = tl.where(inside, (value.to(tl.float32) - centre) * spread, 0.0)
        slope = masked_gradient(grad, y, source, groups * group, channel, inside)
        if gate is not None:
            slope *= tl.load(gate + source, mask=row < end, other=0.0)[:, None, None]
        slope *= scale
        if by_group is None:
            plain = tl.sum(slope, 2, keep_dims=True) / group
            product = tl.sum(slope * normal, 2, keep_dims=True) / group
        result = spread * (slope - plain - normal * product)
        tl.store(x_grad + address, result.to(x_grad.dtype.element_ty), mask=inside)
