"""Rows: a whole pyramid of a batch in one tensor, so that all levels and images share one launch.

    rows (P + 1, C):  level 0: image 0, image 1, ... | level 1: image 0, ... | ... | one row of zeros
                      (y, x row-major inside an image; channels last)

Every level is a channels-last view of its rows, so dense and sparse operations mix without copies. The last row stands
for everything outside: a missing neighbour is the index P.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dyndet.ops.sparse.kept import kept
from dyndet.structures import Size


@dataclass(frozen=True)
class RowLayout:
    """Where the positions of a batch of pyramids lie in a rows tensor.

    A segment is one image at one level; the S = L x B segments follow each other, level by level.

    Attributes:
        shapes: (H_l, W_l) of every level, finest first.
        batch: number of images.
        device: of the index tensors.
    """

    shapes: tuple[Size, ...]
    batch: int
    device: torch.device

    @classmethod
    def of(cls, maps: Sequence[Tensor]) -> RowLayout:
        """The layout of L x (B, C, H, W)."""
        return cls(tuple((x.shape[-2], x.shape[-1]) for x in maps), maps[0].shape[0], maps[0].device)

    @property
    def positions(self) -> int:
        """P: positions of all levels and images."""
        return self.batch * sum(height * width for height, width in self.shapes)

    @property
    def sizes(self) -> list[int]:
        """H_l, W_l of every level in one list, as operators take it; see `from_sizes`."""
        return [side for shape in self.shapes for side in shape]

    @property
    def segments(self) -> int:
        """S = L x B."""
        return len(self.shapes) * self.batch

    @property
    def levels(self) -> list[tuple[int, int]]:
        """First and last + 1 row of every level."""
        bounds, start = [], 0
        for height, width in self.shapes:
            bounds.append((start, start + self.batch * height * width))
            start = bounds[-1][1]
        return bounds

    def rows(self, maps: Sequence[Tensor]) -> Tensor:
        """L x (B, C, H, W) -> (P + 1, C), the last row zero."""
        channels = maps[0].shape[1]
        flat = [x.permute(0, 2, 3, 1).reshape(x[:, 0].numel(), channels) for x in maps]
        return torch.cat([*flat, maps[0].new_zeros(1, channels)])

    def maps(self, rows: Tensor) -> list[Tensor]:
        """(P [+ 1], C) -> L x (B, C, H, W), channels-last views."""
        sizes = [stop - start for start, stop in self.levels]
        parts = rows.split([*sizes, len(rows) - self.positions])  # unlike slices, one pass in the backward direction
        return [
            part.view(self.batch, height, width, rows.shape[1]).permute(0, 3, 1, 2)
            for part, (height, width) in zip(parts, self.shapes, strict=False)
        ]

    def flat(self, maps: Sequence[Tensor]) -> Tensor:
        """L x (B, 1, H, W) -> (P,): one value per position."""
        return torch.cat([x.reshape(-1) for x in maps])

    def unflat(self, values: Tensor) -> list[Tensor]:
        """(P,) -> L x (B, 1, H, W), views."""
        parts = values.split([stop - start for start, stop in self.levels])
        return [
            part.view(self.batch, 1, height, width) for part, (height, width) in zip(parts, self.shapes, strict=True)
        ]

    @property
    def neighbours(self) -> Tensor:
        """Int32 (P, 9): the 3x3 neighbourhood of every position, row-major; P outside the map."""
        return _neighbours(self)

    @property
    def neighbours_by_tap(self) -> tuple[Tensor, Tensor]:
        """Int32 (9 P,) twice. Into values that lie tap by tap, (9, P + 1): for every tap and position, the place where
        its neighbour keeps what it holds for this tap. Into one value per position, (P + 1,): the neighbour on the
        opposite side.
        """
        return _neighbours_by_tap(self)

    @property
    def segment(self) -> Tensor:
        """Int32 (P,): the segment of every position."""
        return _segment(self)

    @property
    def starts(self) -> Tensor:
        """Int32 (S + 1,): first position of every segment, then P."""
        return _starts(self)

    def sending(self, step: int) -> Tensor:
        """Bool (P,): positions of the levels whose index plus `step` is a level too."""
        return _sending(self, step)


def from_sizes(sizes: Sequence[int], batch: int, device: torch.device) -> RowLayout:
    """The layout whose `sizes` these are."""
    return RowLayout(tuple(zip(sizes[::2], sizes[1::2], strict=True)), batch, device)


@kept
def _neighbours(layout: RowLayout) -> Tensor:
    tables = []
    for (start, stop), (height, width) in zip(layout.levels, layout.shapes, strict=True):
        position = torch.arange(start, stop, dtype=torch.int32, device=layout.device)
        grid = position.view(layout.batch, height, width)
        padded = F.pad(grid, (1, 1, 1, 1), value=layout.positions)
        taps = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        tables.append(torch.stack(taps, -1).view(-1, 9))
    return torch.cat(tables)


@kept
def _neighbours_by_tap(layout: RowLayout) -> tuple[Tensor, Tensor]:
    taps = layout.neighbours.t()
    first = torch.arange(9, dtype=torch.int32, device=layout.device)[:, None] * (layout.positions + 1)
    return (taps + first).reshape(-1), taps.flip(0).reshape(-1)


@kept
def _segment(layout: RowLayout) -> Tensor:
    parts = [
        torch.arange(layout.batch, dtype=torch.int32, device=layout.device).repeat_interleave(height * width)
        + level * layout.batch
        for level, (height, width) in enumerate(layout.shapes)
    ]
    return torch.cat(parts)


@kept
def _starts(layout: RowLayout) -> Tensor:
    sizes = [height * width for height, width in layout.shapes for _ in range(layout.batch)]
    bounds = [0]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    return torch.tensor(bounds, dtype=torch.int32, device=layout.device)


@partial(kept, number=16)  # two of a layout
def _sending(layout: RowLayout, step: int) -> Tensor:
    mask = torch.zeros(layout.positions, dtype=torch.bool, device=layout.device)
    for level, (start, stop) in enumerate(layout.levels):
        mask[start:stop] = 0 <= level + step < len(layout.shapes)
    return mask
