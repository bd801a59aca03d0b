"""Which rows to compute: the active positions of a mask, in order.

    positions   3  4  9 12  .  .       row n computes position positions[n]
    inverse     .  .  .  0  1  .  .  .  .  2  .  .  3      the row of a position, or capacity ("nothing there")
    offsets     0 .. N                 first row of every segment; the last entry is the number of rows

Where the number of rows is known on the host (CPU), the capacity is exactly N. Elsewhere it is P, N stays on the
device, nothing waits for it, and rows from N on are undefined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyndet.layout import RowLayout
from dyndet.ops.sparse.direct import ordinary
from dyndet.ops.sparse.execute import triton
from dyndet.ops.sparse.impl import Impl
from dyndet.ops.sparse.kept import kept
from dyndet.ops.sparse.tables import neighbours, segment, starts


@dataclass(frozen=True)
class Plan:
    """Active positions of a layout.

    Attributes:
        layout: of the positions.
        positions: int32 (capacity,), ascending; undefined from the row count on.
        inverse: int32 (P + 1,), the row of every position, `capacity` where it has none; inverse[P] = capacity.
        offsets: int32 (S + 1,), first row of every segment; offsets[S] is the row count.
        whole: every position is active, so that rows are the map itself.
        expected: share of active positions that somebody expects, where the host does not know it.
    """

    layout: RowLayout
    positions: Tensor
    inverse: Tensor
    offsets: Tensor
    whole: bool = False
    expected: float | None = None

    @property
    def capacity(self) -> int:
        return len(self.positions)

    @property
    def exact(self) -> bool:
        """Whether the host knows the row count: it is the capacity."""
        return self.whole or self.capacity < self.layout.positions

    @property
    def density(self) -> float | None:
        """Share of active positions: known where the plan is exact, else what was expected."""
        return self.capacity / max(1, self.layout.positions) if self.exact else self.expected

    @property
    def count(self) -> Tensor:
        """Int32 (1,): the number of rows, on the device."""
        return self.offsets[-1:]

    def check(self, kernels: bool) -> None:
        """Raises ValueError where Triton kernels were to run rows of a plan without room for every position."""
        if kernels and self.capacity < self.layout.positions:
            raise ValueError("this plan was made for another execution: make it and use it with the same impl")

    @property
    def tensors(self) -> list[Tensor]:
        return [self.positions, self.inverse, self.offsets]


@kept
def whole_plan(layout: RowLayout) -> Plan:
    """Every position of the layout: rows are the map."""
    index = torch.arange(layout.positions + 1, dtype=torch.int32, device=layout.device)
    return Plan(layout, index[:-1], index, starts(layout), whole=True)


def make_plans(
    gate: Tensor, layout: RowLayout, *, valid: Tensor | None = None, reaches: Sequence[int] = (0,),
    expected: float | Sequence[float | None] | None = None, impl: Impl = "auto",
) -> list[Plan]:  # fmt: skip
    """Plans of the positions with an open gate within `reach`.

    Args:
        gate: (P,), open where > 0 (or bool).
        layout: of the positions.
        valid: (P,) bool, positions that may be active; None allows all.
        reaches: 0 for the open positions themselves, 1 for their 3x3 neighbourhood; one plan each.
        expected: share of open positions, of which every reach is derived, or one share per reach; what to expect
            where they are counted on the device.
        impl: "triton" (or "auto" on CUDA) counts on the device without waiting.

    Returns:
        One plan per reach.
    """
    if not isinstance(expected, Sequence):
        expected = [reached(expected, reach) for reach in reaches]
    if triton.chosen(impl, gate.device):
        arguments = gate, valid, neighbours(layout), segment(layout), layout.segments, list(reaches)
        if ordinary(gate):
            found = triton.kernels().plan(*arguments)
        else:
            flat = _plan_rows(*arguments)
            found = [flat[first : first + 3] for first in range(0, len(flat), 3)]
        return [Plan(layout, *tensors, expected=share) for tensors, share in zip(found, expected, strict=True)]
    if gate.is_meta:
        return [whole_plan(layout) for _ in reaches]
    if torch.compiler.is_compiling():
        masks = _active(gate, layout, valid, reaches)
        return [_static_plan(active, layout, share) for active, share in zip(masks, expected, strict=True)]
    if valid is None and bool((gate > 0).all()):
        return [whole_plan(layout) for _ in reaches]
    return [_exact_plan(active, layout) for active in _active(gate, layout, valid, reaches)]


def reached(density: float | None, reach: int) -> float | None:
    """The share of positions within `reach` of open gates, of compact ones: of 10 % about 22 %, of 30 % 56 %."""
    return density if density is None or not reach else 1 - (1 - density) ** (1 + 1.3 * reach)


@torch.library.custom_op("dyndet::plan_rows", mutates_args=())
def _plan_rows(
    gate: Tensor, valid: Tensor | None, neighbours: Tensor, segment: Tensor, segments: int, reaches: list[int]
) -> list[Tensor]:
    """By kernels: positions, inverse and offsets of every reach; copies, as results of an operator must not overlap."""
    plans = triton.kernels().plan(gate, valid, neighbours, segment, segments, reaches)
    return [tensor.clone() for plan in plans for tensor in plan]


@_plan_rows.register_fake
def _(
    gate: Tensor, valid: Tensor | None, neighbours: Tensor, segment: Tensor, segments: int, reaches: list[int]
) -> list[Tensor]:
    sizes = (len(gate), len(gate) + 1, segments + 1)
    return [neighbours.new_empty(size) for _ in reaches for size in sizes]


def _active(gate: Tensor, layout: RowLayout, valid: Tensor | None, reaches: Sequence[int]) -> list[Tensor]:
    """Per reach (P,) bool."""
    opened = gate > 0
    masks = []
    for reach in reaches:
        mask = opened
        if reach and torch.compiler.is_compiling():
            mask = torch.cat([opened, opened.new_zeros(1)])[neighbours(layout).long()].any(1)
        elif reach:  # as many indices as are needed
            near = neighbours(layout).index_select(0, opened.nonzero().view(-1)).view(-1)
            mask = opened.new_zeros(len(opened) + 1).index_fill_(0, near.long(), True)[:-1]
        masks.append(mask if valid is None else mask & valid)
    return masks


def _exact_plan(active: Tensor, layout: RowLayout) -> Plan:
    positions = active.nonzero().view(-1).int()
    count = len(positions)
    if count == layout.positions:
        return whole_plan(layout)
    inverse = positions.new_full((layout.positions + 1,), count)
    inverse[positions.long()] = torch.arange(count, dtype=torch.int32, device=layout.device)
    offsets = torch.searchsorted(positions, starts(layout), out_int32=True)
    return Plan(layout, positions, inverse, offsets)


def _static_plan(active: Tensor, layout: RowLayout, expected: float | None) -> Plan:
    """Of capacity P, with shapes that do not depend on values; spare rows compute nothing: they stand for P."""
    size = layout.positions
    before = active.int().cumsum(0, dtype=torch.int32) - active.int()
    inverse = torch.cat([torch.where(active, before, size), before.new_full((1,), size)])
    positions = before.new_full((size + 1,), size)
    index = torch.arange(size, dtype=torch.int32, device=layout.device)
    positions = positions.index_copy(0, inverse[:-1].long(), index)  # inactive ones all land in the spare last place
    ends = torch.cat([before, before[-1:] + active[-1:].int()])
    return Plan(layout, positions[:-1], inverse, ends[starts(layout).long()], expected=expected)
