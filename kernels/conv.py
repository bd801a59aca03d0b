"""3x3 convolution of rows: one persistent gather GEMM, forward and adjoint.

    out[n] = bias + sum_t W_t x[rows[t, n]],    n < N,    9 taps t

is a matrix product of N rows by 9 Cin, whose left operand is gathered while it is loaded and never stored. The loop
over the summed axis is flattened over taps and blocks of input channels, so that it is one software pipeline. Rows
that are missing are predicated away: neither the last row of x nor anything beyond N is read.

The number of rows is known on the device only. A fixed grid, a multiple of the number of multiprocessors, walks over
the tiles there turn out to be. Column tiles of the same rows come next to each other in time: the second finds its
gathered rows in the L2 cache.

Memory: the output and the (9, P) row table; no im2col buffer.
"""

# Device code: to the type checker constants are no numbers and constant branches are branches.
# pyright: reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .depthwise import depthwise_block
from .launch import UPCAST, check_rows, run, target
from .table import table

# Columns of a tile at most: a group of the fused norm must fit.
WIDEST = 256


class PositionNorm(NamedTuple):
    """GroupNorm with statistics per position, fused behind a convolution.

    Attributes:
        weight: (O,) scale.
        bias: (O,) shift.
        groups: number, divides O.
        eps: added to the variance.
        relu: apply a ReLU.
    """

    weight: Tensor
    bias: Tensor
    groups: int
    eps: float
    relu: bool


def conv(
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
    norm: PositionNorm | None = None,
    tf32: bool = False,
    density: float | None = None,
) -> Tensor:
    """3x3 convolution at the positions of a plan, or its adjoint. Two launches, one more to clear with `scatter`.

    Args:
        x: (R+1, Cin) float32, float16 or bfloat16; the last row is not read. With `transposed` (R+1, O).
        weight: (O, Cin, 3, 3) of the same dtype; free of a copy in channels_last.
        bias: (O,) or None; with `transposed` (Cin,).
        positions: (P,) int32 of the output's plan.
        inverse: (P+1,) int32 of the plan of x; None when x is the whole map.
        neighbours: (P, 9) int32.
        offsets: (S+1,) int32 of the output's plan.
        transposed: apply W_{8-t} transposed instead of W_t: the gradient towards x of a convolution whose output
            plan was that of x and whose input plan was that of `positions`.
        scatter: store row n at row positions[n] of an output that is zero elsewhere.
        norm: applied to every output row.
        tf32: let float32 use tensor cores, at a tenth of the precision digits.
        density: expected share of active positions; chooses the tile, never the result.

    Returns:
        (P+1, O), with `transposed` (P+1, Cin), of the dtype of x; without `scatter` undefined beyond the active rows.

    Raises:
        ValueError: on shapes or dtypes that do not fit, or groups of more than 256 channels in `norm`.
    """
    inputs, outputs = (weight.shape[0], weight.shape[1]) if transposed else (weight.shape[1], weight.shape[0])
    if weight.shape[2:] != (3, 3) or weight.dtype != x.dtype:
        raise ValueError(f"weight must be (O, C, 3, 3) {x.dtype}, got {tuple(weight.shape)} {weight.dtype}")
    x = check_rows(x, inputs)
    total = positions.shape[0]
    place_of = target(x.device)
    tile = configs.tile(configs.CONV, place_of, x.dtype, total, density, tf32)
    tile = configs.shrink(tile, columns=outputs, depth=inputs)
    group, padded, width = 0, 1, outputs
    if norm is not None:
        group, padded = group_shape(outputs, norm.groups)
        tile, width = configs.normalised(tile, padded), norm.groups * padded
    tiles = triton.cdiv(total, tile.rows) * triton.cdiv(width, tile.columns)
    out = (x.new_zeros if scatter else x.new_empty)(total + 1, outputs)
    rows = table(positions, inverse, neighbours, offsets)
    run(
        gather_gemm,
        (min(tiles, place_of.multiprocessors * tile.waves),),
        x,
        weight.permute(0, 2, 3, 1).contiguous(),
        bias,
        None if norm is None else norm.weight,
        None if norm is None else norm.bias,
        0.0 if norm is None else norm.eps,
        rows,
        positions,
        offsets,
        out,
        x.shape[0] - 1,
        rows.stride(0),
        offsets.shape[0] - 1,
        inputs=inputs,
        outputs=outputs,
        transposed=transposed,
        scatter=scatter,
        group=group,
        padded=padded,
        relu=norm is not None and norm.relu,
        precision="tf32" if tf32 else "ieee",
        block_rows=tile.rows,
        block_columns=tile.columns,
        block_depth=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def tile_rows(x: Tensor, weight: Tensor, positions: int, density: float | None = None, *, tf32: bool = False) -> int:
    """Rows that `conv` computes together: the last tile of a call counts in full.

    Args:
        x: (R+1, Cin).
        weight: (O, Cin, 3, 3); (C, 1, 3, 3) for `depthwise`.
        positions: P.
        density: as given to `conv`.
        tf32: likewise.
    """
    if weight.shape[1] < x.shape[1]:
        return depthwise_block(x.shape[1])[0]
    return configs.tile(configs.CONV, target(x.device), x.dtype, positions, density, tf32).rows


def group_shape(channels: int, groups: int) -> tuple[int, int]:
    """Channels of a group, and the power of two it is padded to inside a tile."""
    if channels % groups:
        raise ValueError(f"{groups} groups do not divide {channels} channels")
    group = channels // groups
    padded = triton.next_power_of_2(group)
    if padded > WIDEST:
        raise ValueError(f"the fused norm takes groups of {WIDEST} channels at most, got {group}")
    return group, padded


@triton.jit(do_not_specialize=["missing", "segments", "eps"])
def gather_gemm(
    x,
    weight,
    bias,
    scale,
    shift,
    eps,
    rows,
    positions,
    offsets,
    out,
    missing,
    rows_stride,
    segments,
    inputs: tl.constexpr,
    outputs: tl.constexpr,
    transposed: tl.constexpr,
    scatter: tl.constexpr,
    group: tl.constexpr,
    padded: tl.constexpr,
    relu: tl.constexpr,
    precision: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    block_depth: tl.constexpr,
):
    # Constants, not arguments, give channel counts that are a multiple of 8 their full alignment.
    steps: tl.constexpr = (inputs + block_depth - 1) // block_depth
    width: tl.constexpr = outputs if group == 0 else outputs // group * padded
    column_tiles: tl.constexpr = (width + block_columns - 1) // block_columns

    count = tl.load(offsets + segments)
    tiles = tl.cdiv(count, block_rows) * column_tiles
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tile // column_tiles * block_rows + tl.arange(0, block_rows)
        inside = row < count
        column = tile % column_tiles * block_columns + tl.arange(0, block_columns)
        live = column < width
        if group > 0:  # a tile holds whole groups, each padded to a power of two
            live &= column % padded < group
            column = column // padded * group + column % padded

        total = tl.zeros((block_rows, block_columns), tl.float32)
        for step in range(9 * steps):
            tap = step // steps
            depth = step % steps * block_depth + tl.arange(0, block_depth)
            filled = depth < inputs
            source = tl.load(rows + tap * rows_stride + row, mask=inside, other=missing)
            left = tl.load(
                x + source.to(tl.int64)[:, None] * inputs + depth[None, :],
                mask=(source < missing)[:, None] & filled[None, :],
                other=0.0,
            )
            if transposed:  # weight lies as (O, 9, Cin) and O is summed
                at = (depth[:, None] * 9 + 8 - tap) * outputs + column[None, :]
            else:  # weight lies as (O, 9, Cin) and Cin is summed
                at = (column[None, :] * 9 + tap) * inputs + depth[:, None]
            right = tl.load(weight + at, mask=filled[:, None] & live[None, :], other=0.0)
            if UPCAST:
                left, right = left.to(tl.float32), right.to(tl.float32)
            total = tl.dot(left, right, total, input_precision=precision)

        if bias is not None:
            total += tl.load(bias + column, mask=live, other=0.0).to(tl.float32)[None, :]
        if group > 0:
            grouped = total.reshape(block_rows, block_columns // padded, padded)
            real = (tl.arange(0, padded) < group)[None, None, :]
            mean = tl.sum(grouped, 2, keep_dims=True) / group  # the padding is zero
            centred = tl.where(real, grouped - mean, 0.0)
            variance = tl.sum(centred * centred, 2, keep_dims=True) / group
            total = (centred * tl.rsqrt(variance + eps)).reshape(block_rows, block_columns)
            total *= tl.load(scale + column, mask=live, other=0.0).to(tl.float32)[None, :]
            total += tl.load(shift + column, mask=live, other=0.0).to(tl.float32)[None, :]
            if relu:
                total = tl.maximum(total, 0.0)
        target_row = tl.load(positions + row, mask=inside, other=0) if scatter else row
        address = out + target_row.to(tl.int64)[:, None] * outputs + column[None, :]
        tl.store(address, total.to(out.dtype.element_ty), mask=inside[:, None] & live[None, :])
