"""Plans: the list of active positions, built on the device.

Two launches for all reaches together. The first marks active positions and counts them per block; the second gives
each its row: the counts of all earlier blocks (at most a few thousand, summed by every program anew, which is cheaper
than a third launch) plus a running sum inside the block. The marks live in `inverse` between the two launches, where
every program finds its own and overwrites them with rows.

The number of active rows stays on the device, as the last offset; every buffer has the size of all positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import run

BLOCK = 1024


class Plan(NamedTuple):
    """Active positions of a pyramid.

    Attributes:
        positions: (P,) int32, ascending; undefined beyond the number of active rows.
        inverse: (P+1,) int32, the row of each position, P where it has none; the last is P.
        offsets: (S+1,) int32, the first row of each segment; the last is the number of active rows.
    """

    positions: Tensor
    inverse: Tensor
    offsets: Tensor


def plan(
    gate: Tensor, valid: Tensor | None, neighbours: Tensor, segment: Tensor, segments: int, reaches: Sequence[int]
) -> list[Plan]:
    """List the positions that are active, once per reach.

    Args:
        gate: (P,) bool or float; open where > 0.
        valid: (P,) bool, positions that exist; None for all.
        neighbours: (P, 9) int32, P where there is none.
        segment: (P,) int32, sorted, every segment present.
        segments: S.
        reaches: 0 takes the open positions, 1 those and their neighbours.

    Returns:
        A plan per reach; their tensors are views of the buffers of `stacked_plans`.

    Raises:
        ValueError: on a reach other than 0 and 1.
    """
    positions, inverse, offsets = stacked_plans(gate, valid, neighbours, segment, segments, reaches)
    total = gate.shape[0]
    return [
        Plan(positions[index, :total], inverse[index, : total + 1], offsets[index, : segments + 1])
        for index in range(len(reaches))
    ]


def stacked_plans(
    gate: Tensor, valid: Tensor | None, neighbours: Tensor, segment: Tensor, segments: int, reaches: Sequence[int]
) -> Plan:
    """`plan` in three buffers, (reaches, P or more), (reaches, P + 1 or more) and (reaches, S + 1 or more)."""
    if not reaches or any(reach not in (0, 1) for reach in reaches):
        raise ValueError(f"reaches must be 0 or 1, got {list(reaches)}")
    total, number = gate.shape[0], len(reaches)
    blocks = triton.cdiv(total, BLOCK)
    gate = gate.view(torch.uint8) if gate.dtype == torch.bool else gate
    exists = None if valid is None else valid.contiguous().view(torch.uint8)
    counts = torch.empty(number, blocks, dtype=torch.int32, device=gate.device)
    positions = _aligned(number, total, counts)
    inverse = _aligned(number, total + 1, counts)
    offsets = _aligned(number, segments + 1, counts)
    # The reaches are bits of one constant: a tensor of them would have to be copied from the host.
    bits = sum(reach << index for index, reach in enumerate(reaches))
    run(
        mark,
        (blocks, number),
        gate.contiguous(),
        exists,
        neighbours,
        inverse,
        counts,
        total,
        inverse.stride(0),
        reaches=bits,
        block=BLOCK,
        num_warps=4,
    )
    run(
        emit,
        (blocks, number),
        segment,
        counts,
        positions,
        inverse,
        offsets,
        total,
        segments,
        positions.stride(0),
        inverse.stride(0),
        offsets.stride(0),
        block=BLOCK,
        num_warps=4,
    )
    return Plan(positions, inverse, offsets)


def _aligned(number: int, length: int, like: Tensor) -> Tensor:
    """(number, length or more) int32 whose rows all begin at an address that kernels can read in wide words."""
    return like.new_empty(number, triton.cdiv(length, 64) * 64)


@triton.jit
def positive(gate, index, inside):
    """Whether gate[index] > 0; False where not inside."""
    value = tl.load(gate + index, mask=inside, other=0)
    if gate.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    return value > 0


@triton.jit(do_not_specialize=["total"], do_not_specialize_on_alignment=["gate"])
def mark(gate, valid, neighbours, marks, counts, total, stride, reaches: tl.constexpr, block: tl.constexpr):
    which = tl.program_id(1)
    position = tl.program_id(0) * block + tl.arange(0, block)
    inside = position < total
    active = positive(gate, position, inside)
    if ((reaches >> which) & 1) != 0:
        for tap in range(9):
            neighbour = tl.load(neighbours + position * 9 + tap, mask=inside, other=total)
            active |= positive(gate, neighbour, neighbour < total)
    if valid is not None:
        active &= tl.load(valid + position, mask=inside, other=0) != 0
    flag = active.to(tl.int32)
    tl.store(marks + which * stride + position, flag, mask=inside)
    tl.store(counts + which * tl.num_programs(0) + tl.program_id(0), tl.sum(flag))


@triton.jit(do_not_specialize=["total", "segments"])
def emit(
    segment,
    counts,
    positions,
    inverse,
    offsets,
    total,
    segments,
    positions_stride,
    inverse_stride,
    offsets_stride,
    block: tl.constexpr,
):
    which = tl.program_id(1)
    counts += which * tl.num_programs(0)
    positions += which * positions_stride
    inverse += which * inverse_stride
    offsets += which * offsets_stride

    lane = tl.arange(0, block)
    earlier = tl.zeros((block,), tl.int32)
    for start in range(0, tl.program_id(0), block):
        earlier += tl.load(counts + start + lane, mask=start + lane < tl.program_id(0), other=0)

    position = tl.program_id(0) * block + lane
    inside = position < total
    flag = tl.load(inverse + position, mask=inside, other=0)  # the marks of the first launch
    row = tl.sum(earlier) + tl.cumsum(flag, 0) - flag  # active positions before this one
    tl.store(positions + row, position, mask=flag != 0)
    tl.store(inverse + position, tl.where(flag != 0, row, total), mask=inside)

    own = tl.load(segment + position, mask=inside, other=0)
    previous = tl.load(segment + position - 1, mask=inside & (position > 0), other=-1)
    tl.store(offsets + own, row, mask=inside & (own != previous))
    last = position == total - 1
    tl.store(offsets + segments + tl.zeros_like(row), row + flag, mask=last)
    tl.store(inverse + total + tl.zeros_like(row), total, mask=last)
