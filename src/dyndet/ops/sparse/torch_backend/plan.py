"""Plans in plain torch: as many rows as are active, or room for all with shapes that do not depend on values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dyndet.layout import RowLayout
from dyndet.ops.sparse.tables import neighbours, starts


def plan(gate: Tensor, valid: Tensor | None, layout: RowLayout, reaches: Sequence[int], exact: bool) -> list[Tensor]:
    """Positions, inverse and offsets, see the operator.

    `exact`: the capacity is the number of rows; otherwise it is P, and spare rows stand for P.
    """
    opened = gate > 0
    found: list[list[Tensor]] = []
    for reach in reaches:
        active = opened
        if reach:  # nine indices per open gate
            near = neighbours(layout).index_select(0, opened.nonzero().view(-1)).view(-1)
            active = opened.new_zeros(len(opened) + 1).index_fill_(0, near.long(), True)[:-1]
        active = active if valid is None else active & valid
        found.append(_exact(active, layout) if exact else _roomy(active, layout))
    if exact:
        return [part for trio in found for part in trio]
    return [F.pad(torch.stack(parts), (0, -len(parts[0]) % 64)) for parts in zip(*found, strict=True)]


def _exact(active: Tensor, layout: RowLayout) -> list[Tensor]:
    index = active.nonzero().view(-1)
    count, positions = len(index), index.int()
    if count == layout.positions:
        return [positions.new_empty(0) for _ in range(3)]
    inverse = positions.new_full((layout.positions + 1,), count)
    inverse.index_copy_(0, index, torch.arange(count, dtype=torch.int32, device=layout.device))
    return [positions, inverse, torch.searchsorted(positions, starts(layout), out_int32=True)]


def _roomy(active: Tensor, layout: RowLayout) -> list[Tensor]:
    size = layout.positions
    before = F.pad(active.cumsum(0, dtype=torch.int32), (1, 0))  # active ones before every position
    inverse = F.pad(torch.where(active, before[:-1], size), (0, 1), value=size)
    positions = before.new_full((size + 1,), size)
    index = torch.arange(size, dtype=torch.int32, device=layout.device)
    positions.index_copy_(0, inverse[:-1].long(), index)  # inactive ones all land in the spare last place
    return [positions[:-1], inverse, before[starts(layout).long()]]
