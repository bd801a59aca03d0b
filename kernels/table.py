"""The rows that each output row reads: positions, neighbours and inverse composed once, stored tap by tap.

Tap-major (9, P) because the GEMM reads a block of rows at one tap: consecutive output rows are consecutive in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import run

BLOCK = 256


def table(positions: Tensor, inverse: Tensor | None, neighbours: Tensor, offsets: Tensor) -> Tensor:
    """Compose the row numbers of nine taps.

    Args:
        positions: (P,) int32, positions of the output rows.
        inverse: (P+1,) int32 of the plan that the input rows belong to; None when the input is the whole map.
        neighbours: (P, 9) int32.
        offsets: (S+1,) int32, the last is the number of output rows.

    Returns:
        (9, P or more) int32, rows padded for alignment; P where there is no input row, undefined beyond the output
        rows.
    """
    total = positions.shape[0]
    stride = triton.cdiv(total, 64) * 64
    rows = torch.empty(9, stride, dtype=torch.int32, device=positions.device)
    grid = (triton.cdiv(total, BLOCK),)
    segments = offsets.shape[0] - 1
    run(compose, grid, positions, inverse, neighbours, offsets, rows, stride, segments, block=BLOCK, num_warps=4)
    return rows


@triton.jit(do_not_specialize=["segments"])
def compose(positions, inverse, neighbours, offsets, rows, stride, segments, block: tl.constexpr):
    count = tl.load(offsets + segments)
    start = tl.program_id(0) * block
    if start < count:
        row = start + tl.arange(0, block)
        inside = row < count
        position = tl.load(positions + row, mask=inside, other=0)
        for tap in range(9):
            source = tl.load(neighbours + position * 9 + tap, mask=inside, other=0)
            if inverse is not None:
                source = tl.load(inverse + source, mask=inside, other=0)
            tl.store(rows + tap * stride + row, source, mask=inside)
