"""Depthwise 3x3 convolution of rows, its adjoint and its weight gradient: no tensor cores, bound by memory.

    out[n, c] = bias[c] + sum_t w[c, t] x[rows[t, n], c],    n < N

A program holds a few rows by at most 128 channels, so that nine taps of them fit the registers, and looks the rows up
itself (a table in memory would be read once only). The weight gradient splits the rows over programs, as that of the
full convolution does, with the bias as a tenth tap whose input is one.
"""

# Device code: to the type checker constants are no numbers and constant branches are branches.
# pyright: reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_rows, run, target

# Elements of a tile for 4 warps: 16 per thread.
ELEMENTS = 2048
WIDEST = 128
# Programs per multiprocessor.
WAVES = 8


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    inverse: Tensor | None,
    neighbours: Tensor,
    offsets: Tensor,
    *,
    transposed: bool = False,
    scatter: bool = False,
) -> Tensor:
    """Depthwise 3x3 convolution at the positions of a plan, or its adjoint. One launch, one more with `scatter`.

    Args:
        x: (R+1, C) float32, float16 or bfloat16; the last row is not read.
        weight: (C, 1, 3, 3).
        bias: (C,) or None.
        positions: (P,) int32 of the output's plan.
        inverse: (P+1,) int32 of the plan of x; None when x is the whole map.
        neighbours: (P, 9) int32.
        offsets: (S+1,) int32 of the output's plan.
        transposed: flip the taps: the gradient towards x, with the two plans exchanged.
        scatter: store row n at row positions[n] of an output that is zero elsewhere.

    Returns:
        (P+1, C) of the dtype of x; without `scatter` undefined beyond the active rows.

    Raises:
        ValueError: on shapes or dtypes that do not fit.
    """
    channels, total = weight.shape[0], positions.shape[0]
    if weight.shape[1:] != (1, 3, 3):
        raise ValueError(f"weight must be (C, 1, 3, 3), got {tuple(weight.shape)}")
    x = check_rows(x, channels)
    out = (x.new_zeros if scatter else x.new_empty)(total + 1, channels)
    block_rows, block_columns = depthwise_block(channels)
    tiles = triton.cdiv(total, block_rows) * triton.cdiv(channels, block_columns)
    run(
        depthwise_rows,
        (min(tiles, target(x.device).multiprocessors * WAVES),),
        x,
        weight.contiguous(),
        bias,
        positions,
        inverse,
        neighbours,
        offsets,
        out,
        x.shape[0] - 1,
        offsets.shape[0] - 1,
        channels=channels,
        transposed=transposed,
        scatter=scatter,
        block_rows=block_rows,
        block_columns=block_columns,
        num_warps=4,
    )
    return out


def depthwise_weight_grad(
    x: Tensor, grad: Tensor, positions: Tensor, inverse: Tensor | None, neighbours: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight and bias of `depthwise`. Two launches.

    Args:
        x: (R+1, C), what the convolution was given.
        grad: (P+1, C) of the same dtype, by output row.
        positions: (P,) int32 of the output's plan.
        inverse: (P+1,) int32 of the plan of x; None when x is the whole map.
        neighbours: (P, 9) int32.
        offsets: (S+1,) int32 of the output's plan.

    Returns:
        (C, 1, 3, 3) float32, and (C,) float32.

    Raises:
        ValueError: on shapes or dtypes that do not fit.
    """
    x = check_rows(x)
    grad = check_rows(grad, x.shape[1], like=x)
    channels, total = x.shape[1], positions.shape[0]
    block_rows, block_columns = depthwise_block(channels)
    blocks = triton.cdiv(channels, block_columns)
    splits = max(1, min(triton.cdiv(total, block_rows), target(x.device).multiprocessors * WAVES // (10 * blocks)))
    partial = torch.empty(splits, 10, channels, dtype=torch.float32, device=x.device)
    run(
        depthwise_sums,
        (blocks, 10, splits),
        x,
        grad,
        positions,
        inverse,
        neighbours,
        offsets,
        partial,
        x.shape[0] - 1,
        offsets.shape[0] - 1,
        channels=channels,
        block_rows=block_rows,
        block_columns=block_columns,
        num_warps=4,
    )
    sums = partial.sum(0)
    return sums[:9].t().reshape(channels, 1, 3, 3), sums[9]


def depthwise_block(channels: int) -> tuple[int, int]:
    """Rows and channels of a tile."""
    columns = min(triton.next_power_of_2(channels), WIDEST)
    return min(ELEMENTS // columns, 128), columns


@triton.jit(do_not_specialize=["missing", "segments"])
def depthwise_rows(
    x,
    weight,
    bias,
    positions,
    inverse,
    neighbours,
    offsets,
    out,
    missing,
    segments,
    channels: tl.constexpr,
    transposed: tl.constexpr,
    scatter: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    column_tiles: tl.constexpr = (channels + block_columns - 1) // block_columns
    count = tl.load(offsets + segments)
    tiles = tl.cdiv(count, block_rows) * column_tiles
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tile // column_tiles * block_rows + tl.arange(0, block_rows)
        inside = row < count
        column = tile % column_tiles * block_columns + tl.arange(0, block_columns)
        live = column < channels
        position = tl.load(positions + row, mask=inside, other=0)
        total = tl.zeros((block_rows, block_columns), tl.float32)
        if bias is not None:
            total += tl.load(bias + column, mask=live, other=0.0).to(tl.float32)[None, :]
        for tap in range(9):
            source = tl.load(neighbours + position * 9 + tap, mask=inside, other=missing)
            if inverse is not None:
                source = tl.load(inverse + source, mask=inside, other=missing)
            value = tl.load(
                x + source.to(tl.int64)[:, None] * channels + column[None, :],
                mask=(source < missing)[:, None] & live[None, :],
                other=0.0,
            )
            factor = tl.load(weight + column * 9 + (8 - tap if transposed else tap), mask=live, other=0.0)
            total += value.to(tl.float32) * factor.to(tl.float32)[None, :]
        target_row = position if scatter else row
        address = out + target_row.to(tl.int64)[:, None] * channels + column[None, :]
        tl.store(address, total.to(out.dtype.element_ty), mask=inside[:, None] & live[None, :])


@triton.jit(do_not_specialize=["missing", "segments"])
def depthwise_sums(
    x,
    grad,
    positions,
    inverse,
    neighbours,
    offsets,
    partial,
    missing,
    segments,
    channels: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    tap = tl.program_id(1)
    count = tl.load(offsets + segments)
    column = tl.program_id(0) * block_columns + tl.arange(0, block_columns)
    live = column < channels
    total = tl.zeros((block_rows, block_columns), tl.float32)
    for start in range(tl.program_id(2) * block_rows, count, tl.num_programs(2) * block_rows):
        row = start + tl.arange(0, block_rows)
        inside = row < count
        factor = tl.load(
            grad + row.to(tl.int64)[:, None] * channels + column[None, :],
            mask=inside[:, None] & live[None, :],
            other=0.0,
        ).to(tl.float32)
        if tap < 9:
            position = tl.load(positions + row, mask=inside, other=0)
            source = tl.load(neighbours + position * 9 + tap, mask=inside, other=missing)
            if inverse is not None:
                source = tl.load(inverse + source, mask=inside, other=missing)
            value = tl.load(
                x + source.to(tl.int64)[:, None] * channels + column[None, :],
                mask=(source < missing)[:, None] & live[None, :],
                other=0.0,
            )
            factor *= value.to(tl.float32)
        total += factor
    address = partial + (tl.program_id(2) * 10 + tap) * channels + column
    tl.store(address, tl.sum(total, 0), mask=live)
