"""Rows: a whole pyramid of a batch in one tensor, so that all levels and images share one operation.

    rows (P + 1, C):  level 0: image 0, image 1, ... | level 1: image 0, ... | ... | one row of zeros
                      (y, x row-major inside an image; channels last)

Every level is a channels-last view of its rows, so dense and sparse operations mix without copies. The last row stands
for everything outside: a missing neighbour is the index P.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowLayout:
    """Where the positions of a batch of pyramids lie in a rows tensor.

    A segment is one image at one level; the S = L x B segments follow each other, level by level.

    Attributes:
        shapes: (H_l, W_l) of every level, finest first.
        batch: number of images.
        device: of what lies there.
    """

    shapes: tuple[tuple[int, int], ...]
    batch: int
    device: torch.device

    @classmethod
    def of(cls, maps: Sequence[Tensor]) -> RowLayout:
        """The layout of L x (B, C, H, W)."""
        return cls(tuple((x.shape[-2], x.shape[-1]) for x in maps), maps[0].shape[0], maps[0].device)

    @classmethod
    def from_sizes(cls, sizes: Sequence[int], device: torch.device) -> RowLayout:
        """The layout whose `sizes` these are."""
        batch, *sides = sizes
        return cls(tuple(zip(sides[::2], sides[1::2], strict=True)), batch, device)

    @property
    def sizes(self) -> list[int]:
        """B, then H_l, W_l of every level: all there is to know, in one list, as operators take it."""
        return [self.batch, *(side for shape in self.shapes for side in shape)]

    @property
    def positions(self) -> int:
        """P: positions of all levels and images."""
        return self.batch * sum(height * width for height, width in self.shapes)

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
        """L x (B, G, H, W) -> (G, P): values per position; (P,) of L x (B, 1, H, W) is `flat(maps)[0]`."""
        return torch.cat([x.transpose(0, 1).flatten(1) for x in maps], 1)

    def unflat(self, values: Tensor) -> list[Tensor]:
        """(G, P) or (P,) -> L x (B, G, H, W), views."""
        parts = values.reshape(values.shape[:-1].numel(), self.positions).split(
            [stop - start for start, stop in self.levels], 1
        )
        return [
            part.view(len(part), self.batch, height, width).transpose(0, 1)
            for part, (height, width) in zip(parts, self.shapes, strict=True)
        ]

    def per_segment(self, values: Tensor) -> Tensor:
        """(G, P) -> (G, S) sums over every segment: no index, and the same on every run."""
        return torch.cat([part.flatten(2).sum(2).t() for part in self.unflat(values)], 1)
