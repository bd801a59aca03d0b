"""Index tables of a layout, made once for its sizes."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dyndet.layout import RowLayout
from dyndet.ops.sparse.kept import kept


@kept
def neighbours(layout: RowLayout) -> Tensor:
    """Int32 (P, 9): the 3x3 neighbourhood of every position, row-major; P outside the map."""
    tables = []
    for (start, stop), (height, width) in zip(layout.levels, layout.shapes, strict=True):
        position = torch.arange(start, stop, dtype=torch.int32, device=layout.device)
        grid = position.view(layout.batch, height, width)
        padded = F.pad(grid, (1, 1, 1, 1), value=layout.positions)
        taps = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        tables.append(torch.stack(taps, -1).view(-1, 9))
    return torch.cat(tables)


@kept
def neighbours_by_tap(layout: RowLayout) -> tuple[Tensor, Tensor]:
    """Int32 (9 P,) twice. Into values that lie tap by tap, (9, P + 1): for every tap and position, the place where
    its neighbour keeps what it holds for this tap. Into one value per position, (P + 1,): the neighbour on the
    opposite side.
    """
    taps = neighbours(layout).t()
    first = torch.arange(9, dtype=torch.int32, device=layout.device)[:, None] * (layout.positions + 1)
    return (taps + first).reshape(-1), taps.flip(0).reshape(-1)


@kept
def segment(layout: RowLayout) -> Tensor:
    """Int32 (P,): the segment of every position."""
    parts = [
        torch.arange(layout.batch, dtype=torch.int32, device=layout.device).repeat_interleave(height * width)
        + level * layout.batch
        for level, (height, width) in enumerate(layout.shapes)
    ]
    return torch.cat(parts)


@kept
def starts(layout: RowLayout) -> Tensor:
    """Int32 (S + 1,): first position of every segment, then P."""
    sizes = [height * width for height, width in layout.shapes for _ in range(layout.batch)]
    bounds = [0]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    return torch.tensor(bounds, dtype=torch.int32, device=layout.device)


@partial(kept, number=16)  # two of a layout
def sending(layout: RowLayout, step: int) -> Tensor:
    """Bool (P,): positions of the levels whose index plus `step` is a level too."""
    mask = torch.zeros(layout.positions, dtype=torch.bool, device=layout.device)
    for level, (start, stop) in enumerate(layout.levels):
        mask[start:stop] = 0 <= level + step < len(layout.shapes)
    return mask
