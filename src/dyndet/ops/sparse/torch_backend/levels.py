"""The rows of a plan, level by level, and the maps that they belong to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyndet.ops.sparse.plan import Plan


@dataclass(frozen=True)
class Part:
    """What a plan has of one level.

    Attributes:
        rows: its rows in the plan.
        positions: its positions in the layout.
        index: int64 (n,), the places of the rows among these positions; None where they are all of them.
        shape: B, H, W.
    """

    rows: slice
    positions: slice
    index: Tensor | None
    shape: tuple[int, int, int]

    @property
    def empty(self) -> bool:
        return self.rows.start == self.rows.stop

    def spread(self, rows: Tensor) -> Tensor:
        """(capacity + 1, C) -> (B, C, H, W), channels-last: the rows at their places, zero elsewhere."""
        values = rows[self.rows]
        if self.index is not None:
            size = self.positions.stop - self.positions.start
            values = rows.new_zeros(size, rows.shape[1]).index_copy_(0, self.index, values)
        return values.view(*self.shape, -1).permute(0, 3, 1, 2)

    def collect(self, level: Tensor, rows: Tensor) -> None:
        """(B, C, H, W) -> its values at the places of the rows, written to (capacity + 1, C)."""
        values = level.permute(0, 2, 3, 1)
        if self.index is None:
            rows[self.rows].view(values.shape).copy_(values)
        else:
            torch.index_select(values.reshape(-1, rows.shape[1]), 0, self.index, out=rows[self.rows])


def parts(plan: Plan) -> list[Part]:
    """Of every level; reads the offsets."""
    layout, found = plan.layout, []
    ends = [stop for _, stop in layout.levels]
    bounds = [0, *ends] if plan.whole else plan.offsets[:: layout.batch].tolist()
    for level, ((start, stop), shape) in enumerate(zip(layout.levels, layout.shapes, strict=True)):
        rows = slice(bounds[level], bounds[level + 1])
        full = rows.stop - rows.start == stop - start
        index = None if full else plan.positions[rows].long() - start
        found.append(Part(rows, slice(start, stop), index, (layout.batch, *shape)))
    return found
