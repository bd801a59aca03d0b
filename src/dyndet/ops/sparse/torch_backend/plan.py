"""Plans in plain torch: as many rows as are active, or room for all with shapes that do not depend on values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dyndet.layout import RowLayout
from dyndet.ops.sparse.tables import neighbours, starts


def plan(gate: Tensor, valid: Tensor | None, layout: RowLayout, reaches: Sequence[int], exact: bool) -> list[Tensor]:
    """Positions, inverse and offsets of every reach, see `make_plans`.

    Args:
        gate: (P,).
        valid: (P,) bool or None.
        layout: of the positions.
        reaches: 0 or 1.
        exact: the capacity is the number of rows, and plans of all positions are three empty tensors; otherwise it is
            P, and spare rows stand for P.
    """
    opened = gate > 0
    everywhere = exact and valid is None and bool(opened.all())
    found: list[Tensor] = []
    for reach in reaches:
        active = opened
        if reach and not everywhere:  # as many indices as there are open gates
            near = neighbours(layout).index_select(0, opened.nonzero().view(-1)).view(-1)
            active = opened.new_zeros(len(opened) + 1).index_fill_(0, near.long(), True)[:-1]
        active = active if valid is None else active & valid
        found += _exact(active, everywhere, layout) if exact else _roomy(active, layout)
    return found


def _exact(active: Tensor, everywhere: bool, layout: RowLayout) -> list[Tensor]:
    index = active[:0].long() if everywhere else active.nonzero().view(-1)
    count, positions = len(index), index.int()
    if everywhere or count == layout.positions:
        return [positions.new_empty(0) for _ in range(3)]
    inverse = positions.new_full((layout.positions + 1,), count)
    inverse.index_copy_(0, index, torch.arange(count, dtype=torch.int32, device=layout.device))
    return [positions, inverse, torch.searchsorted(positions, starts(layout), out_int32=True)]


def _roomy(active: Tensor, layout: RowLayout) -> list[Tensor]:
    size = layout.positions
    before = active.int().cumsum(0, dtype=torch.int32) - active.int()
    inverse = torch.cat([torch.where(active, before, size), before.new_full((1,), size)])
    positions = before.new_full((size + 1,), size)
    index = torch.arange(size, dtype=torch.int32, device=layout.device)
    positions.index_copy_(0, inverse[:-1].long(), index)  # inactive ones all land in the spare last place
    ends = torch.cat([before, before[-1:] + active[-1:].int()])
    return [positions[:-1].clone(), inverse, ends[starts(layout).long()]]
