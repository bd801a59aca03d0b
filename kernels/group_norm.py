"""GroupNorm of rows, forward: statistics over the active rows of a segment, or of each row alone.

Statistics over a segment take two launches. In the first, program (s, j) of a grid (segments, splits) walks over every
splits-th tile of the rows of segment s and writes a partial (count, mean, M2) per group; M2 is the sum of squared
deviations. A tile is read once and summed twice from registers, tiles and partials are merged by

    mean = mean_a + d n_b / n,   M2 = M2_a + M2_b + d^2 n_a n_b / n,   d = mean_b - mean_a

(Chan, Golub and LeVeque 1983, eq. 2.1), for E[x^2] - E[x]^2 loses all digits where the mean is large. In the second
launch every program merges the partials of its segment once and normalises its rows. No atomics: the result is
deterministic, and nothing has to be cleared.

A tile is (rows, groups, channels of a group), the last two padded to powers of two, so that a group is an axis and any
number of groups works. Memory: 3 x S x splits x groups float32.
"""

# Device code: to the type checker constants are no numbers and constant branches are branches.
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import check_rows, run, target

Stats = Literal["active", "position"]

# Elements of a tile for 4 warps: 32 per thread.
ELEMENTS = 4096


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    offsets: Tensor,
    *,
    groups: int,
    eps: float,
    stats: Stats,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """GroupNorm over rows. Two launches with "active" statistics, one with "position".

    Args:
        x: (P+1, C) float32, float16 or bfloat16.
        weight: (C,) scale.
        bias: (C,) shift.
        offsets: (S+1,) int32 of the plan of x.
        groups: divides C.
        eps: added to the (biased) variance.
        stats: "active" over a segment's rows and the channels of a group; "position" over those of each row.
        relu: apply a ReLU.

    Returns:
        (P+1, C) of the dtype of x; mean and 1 / sqrt(variance + eps), float32 (S, groups) or, by row, (P, groups).
        Beyond the active rows undefined; a segment without rows has mean 0.

    Raises:
        ValueError: on shapes or dtypes that do not fit.
    """
    x = check_rows(x, weight.shape[0])
    segments, splits = offsets.shape[0] - 1, configs.splits(target(x.device), offsets.shape[0] - 1)
    shape = tile_shape(x.shape[1], groups, ELEMENTS)
    y = torch.empty_like(x)
    mean, rstd = statistics(x.shape[0] - 1 if stats == "position" else segments, groups, x.device)
    partial = None if stats == "position" else moments(x, offsets, groups)
    run(
        apply,
        (segments, splits),
        x,
        weight,
        bias,
        partial,
        offsets,
        y,
        mean,
        rstd,
        eps,
        **shape,
        splits=splits,
        relu=relu,
        num_warps=4,
    )
    return y, mean, rstd


def moments(x: Tensor, offsets: Tensor, groups: int) -> Tensor:
    """(S, splits, 3, groups) float32 count, mean and M2 of each program's rows. One launch."""
    segments, splits = offsets.shape[0] - 1, configs.splits(target(x.device), offsets.shape[0] - 1)
    partial = torch.empty(segments, splits, 3, groups, dtype=torch.float32, device=x.device)
    shape = tile_shape(x.shape[1], groups, ELEMENTS)
    run(gather_moments, (segments, splits), x, offsets, partial, **shape, num_warps=4)
    return partial


def statistics(rows: int, groups: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Empty mean and rstd, both (rows, groups) float32."""
    mean = torch.empty(rows, groups, dtype=torch.float32, device=device)
    return mean, torch.empty_like(mean)


def tile_shape(channels: int, groups: int, elements: int) -> dict[str, int]:
    """Constants that describe a tile (block, wide, deep) of `groups` groups of `group` channels."""
    if channels % groups:
        raise ValueError(f"{groups} groups do not divide {channels} channels")
    group = channels // groups
    wide, deep = triton.next_power_of_2(groups), triton.next_power_of_2(group)
    block = min(max(elements // (wide * deep), 1), 64)
    return {"groups": groups, "group": group, "wide": wide, "deep": deep, "block": block}


@triton.jit
def channels_of(groups: tl.constexpr, group: tl.constexpr, wide: tl.constexpr, deep: tl.constexpr):
    """(1, wide, deep) channel numbers, and which of them exist."""
    which = tl.arange(0, wide)[None, :, None]
    lane = tl.arange(0, deep)[None, None, :]
    return which * group + lane, (which < groups) & (lane < group)


@triton.jit
def merge(partial, segment, groups: tl.constexpr, wide: tl.constexpr, splits: tl.constexpr):
    """Mean and biased variance (wide,) of a segment from the partials of its programs; 0 without rows."""
    which = tl.arange(0, wide)
    split = tl.arange(0, splits)
    address = partial + ((segment * splits + split) * 3 * groups)[:, None] + which[None, :]
    live = (which < groups)[None, :]
    count = tl.load(address, mask=live, other=0.0)
    mean = tl.load(address + groups, mask=live, other=0.0)
    scatter = tl.load(address + 2 * groups, mask=live, other=0.0)
    total = tl.maximum(tl.sum(count, 0), 1.0)
    overall = tl.sum(count * mean, 0) / total
    distance = mean - overall[None, :]
    return overall, tl.sum(scatter + count * distance * distance, 0) / total


@triton.jit
def gather_moments(
    x,
    offsets,
    partial,
    groups: tl.constexpr,
    group: tl.constexpr,
    wide: tl.constexpr,
    deep: tl.constexpr,
    block: tl.constexpr,
):
    segment, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    end = tl.load(offsets + segment + 1)
    channel, live = channels_of(groups, group, wide, deep)
    count = tl.zeros((wide,), tl.float32)
    mean = tl.zeros((wide,), tl.float32)
    scatter = tl.zeros((wide,), tl.float32)
    for start in range(tl.load(offsets + segment) + split * block, end, splits * block):
        row = start + tl.arange(0, block)
        inside = (row < end)[:, None, None] & live
        value = tl.load(x + row.to(tl.int64)[:, None, None] * (groups * group) + channel, mask=inside, other=0.0)
        value = value.to(tl.float32)
        here = (tl.minimum(end - start, block) * group).to(tl.float32)
        tile_mean = tl.sum(tl.sum(value, 2), 0) / here
        centred = tl.where(inside, value - tile_mean[None, :, None], 0.0)
        total = count + here
        shift = tile_mean - mean
        mean += shift * (here / total)
        scatter += tl.sum(tl.sum(centred * centred, 2), 0) + shift * shift * (count * here / total)
        count = total
    which = tl.arange(0, wide)
    address = partial + (segment * splits + split) * 3 * groups + which
    tl.store(address, count, mask=which < groups)
    tl.store(address + groups, mean, mask=which < groups)
    tl.store(address + 2 * groups, scatter, mask=which < groups)


@triton.jit(do_not_specialize=["eps"])
def apply(
    x,
    weight,
    bias,
    partial,
    offsets,
    y,
    mean_out,
    rstd_out,
    eps,
    groups: tl.constexpr,
    group: tl.constexpr,
    wide: tl.constexpr,
    deep: tl.constexpr,
    block: tl.constexpr,
    splits: tl.constexpr,
    relu: tl.constexpr,
):
    segment, split = tl.program_id(0), tl.program_id(1)
    end = tl.load(offsets + segment + 1)
    channel, live = channels_of(groups, group, wide, deep)
    which = tl.arange(0, wide)
    scale = tl.load(weight + channel, mask=live, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=live, other=0.0).to(tl.float32)
    if partial is not None:
        mean, variance = merge(partial, segment, groups, wide, splits)
        rstd = tl.rsqrt(variance + eps)
        if split == 0:
            tl.store(mean_out + segment * groups + which, mean, mask=which < groups)
            tl.store(rstd_out + segment * groups + which, rstd, mask=which < groups)
        mean, rstd = mean[None, :], rstd[None, :]
    for start in range(tl.load(offsets + segment) + split * block, end, splits * block):
        row = start + tl.arange(0, block)
        inside = (row < end)[:, None, None] & live
        address = row.to(tl.int64)[:, None, None] * (groups * group) + channel
        value = tl.load(x + address, mask=inside, other=0.0).to(tl.float32)
        if partial is None:
            mean = tl.sum(value, 2) / group
            centred = tl.where(inside, value - mean[:, :, None], 0.0)
            rstd = tl.rsqrt(tl.sum(centred * centred, 2) / group + eps)
            row_groups = row[:, None] * groups + which[None, :]
            tl.store(mean_out + row_groups, mean, mask=(row < end)[:, None] & (which < groups)[None, :])
            tl.store(rstd_out + row_groups, rstd, mask=(row < end)[:, None] & (which < groups)[None, :])
        value = (value - mean[:, :, None]) * rstd[:, :, None] * scale + shift
        if relu:
            value = tl.maximum(value, 0.0)
        tl.store(y + address, value.to(y.dtype.element_ty), mask=inside)
