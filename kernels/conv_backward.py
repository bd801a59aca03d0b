"""Weight gradient of the 3x3 convolution of rows: a gathered product A^T B, split over rows.

    dW_t = sum_n grad[n]^T x[rows[t, n]],    db = sum_n grad[n],    n < N

One program owns a block of output by input channels at one tap, and every splits-th block of rows. It writes its sum
to a buffer of its own; a reduction adds the splits in a fixed order, so that the result is deterministic. (The
gradient towards x is `conv` with `transposed`.)

Memory: splits x (9 Cin + 1) x O float32, and the (9, P) row table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import UPCAST, check_rows, run, target
from .table import table


def conv_weight_grad(
    x: Tensor,
    grad: Tensor,
    positions: Tensor,
    inverse: Tensor | None,
    neighbours: Tensor,
    offsets: Tensor,
    *,
    tf32: bool = False,
    density: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight and bias of `conv`. Three launches.

    Args:
        x: (R+1, Cin), what the convolution was given.
        grad: (P+1, O) of the same dtype, by output row.
        positions: (P,) int32 of the output's plan.
        inverse: (P+1,) int32 of the plan of x; None when x is the whole map.
        neighbours: (P, 9) int32.
        offsets: (S+1,) int32 of the output's plan.
        tf32: let float32 use tensor cores, see `conv`; the bias gradient is summed in float32 either way.
        density: expected share of active positions; chooses the tile, never the result.

    Returns:
        (O, Cin, 3, 3) float32 in channels_last, and (O,) float32.

    Raises:
        ValueError: on dtypes that do not fit.
    """
    x, grad = check_rows(x), check_rows(grad, like=x)
    inputs, outputs, total = x.shape[1], grad.shape[1], positions.shape[0]
    place_of = target(x.device)
    tile = configs.tile(configs.WEIGHT_GRAD, place_of, x.dtype, total, density, tf32)
    tile = configs.shrink(tile, rows=outputs, columns=inputs)
    blocks = triton.cdiv(outputs, tile.rows) * triton.cdiv(inputs, tile.columns)
    splits = configs.row_splits(place_of, tile, 9 * blocks)
    size = outputs * 9 * inputs
    stride = triton.cdiv(size + outputs, 64) * 64
    partial = torch.empty(splits, stride, dtype=torch.float32, device=x.device)
    rows = table(positions, inverse, neighbours, offsets)
    run(
        weight_grad_gemm,
        (blocks, 9, splits),
        x,
        grad,
        rows,
        offsets,
        partial,
        x.shape[0] - 1,
        rows.stride(0),
        stride,
        offsets.shape[0] - 1,
        inputs=inputs,
        outputs=outputs,
        precision="tf32" if tf32 else "ieee",
        block_rows=tile.rows,
        block_columns=tile.columns,
        block_depth=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    sums = partial.sum(0)
    weight_grad = sums[:size].view(outputs, 3, 3, inputs).permute(0, 3, 1, 2)
    return weight_grad, sums[size : size + outputs]


@triton.jit(do_not_specialize=["missing", "segments"])
def weight_grad_gemm(
    x,
    grad,
    rows,
    offsets,
    partial,
    missing,
    rows_stride,
    partial_stride,
    segments,
    inputs: tl.constexpr,
    outputs: tl.constexpr,
    precision: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    block_depth: tl.constexpr,
):
    column_tiles: tl.constexpr = (inputs + block_columns - 1) // block_columns
    tap = tl.program_id(1)
    count = tl.load(offsets + segments)
    output = tl.program_id(0) // column_tiles * block_rows + tl.arange(0, block_rows)
    channel = tl.program_id(0) % column_tiles * block_columns + tl.arange(0, block_columns)
    lane = tl.arange(0, block_depth)
    first = tl.program_id(2) * block_depth
    stride = tl.num_programs(2) * block_depth
    partial += tl.program_id(2).to(tl.int64) * partial_stride

    total = tl.zeros((block_rows, block_columns), tl.float32)
    for start in range(first, count, stride):
        row = start + lane
        inside = row < count
        source = tl.load(rows + tap * rows_stride + row, mask=inside, other=missing)
        left = tl.load(
            grad + row.to(tl.int64)[:, None] * outputs + output[None, :],
            mask=inside[:, None] & (output < outputs)[None, :],
            other=0.0,
        )
        right = tl.load(
            x + source.to(tl.int64)[:, None] * inputs + channel[None, :],
            mask=(source < missing)[:, None] & (channel < inputs)[None, :],
            other=0.0,
        )
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(tl.trans(left), right, total, input_precision=precision)
    address = (output[:, None] * 9 + tap) * inputs + channel[None, :]
    tl.store(partial + address, total, mask=(output < outputs)[:, None] & (channel < inputs)[None, :])

    # The bias belongs to no tap: the programs of the first one pass over their gradients once more.
    if (tap == 0) & (tl.program_id(0) % column_tiles == 0):
        sums = tl.zeros((block_depth, block_rows), tl.float32)
        for start in range(first, count, stride):
            row = start + lane
            left = tl.load(
                grad + row.to(tl.int64)[:, None] * outputs + output[None, :],
                mask=(row < count)[:, None] & (output < outputs)[None, :],
                other=0.0,
            )
            sums += left.to(tl.float32)
        tl.store(partial + outputs * 9 * inputs + output, tl.sum(sums, 0), mask=output < outputs)
