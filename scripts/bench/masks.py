"""Masks of a wanted density, and gates that open exactly there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dyndet.ops.sparse import RowLayout
from dyndet.structures import Size

Mask = Literal["blob", "iid"]
MASKS: tuple[Mask, ...] = ("blob", "iid")


def masks(kind: Mask, density: float, shapes: Sequence[Size], batch: int, seed: int = 0) -> list[Tensor]:
    """Bool maps L x (B, 1, H, W), the same on every machine.

    Args:
        kind: "blob" makes compact regions, as objects do: noise at a quarter of the resolution, interpolated. Bicubic,
            because their neighbourhoods then cover what the goals assume: 14, 24, 41, 55, 76 % at a density of 5, 10,
            20, 30, 50 % (bilinear: somewhat less). "iid" draws every position by itself.
        density: share of active positions; met in every image and level up to rounding, and by one position at least.
        shapes: (H_l, W_l) of every level.
        batch: number of images.
        seed: of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    return [_map(kind, density, height, width, batch, generator) for height, width in shapes]


def _map(kind: Mask, density: float, height: int, width: int, batch: int, generator: torch.Generator) -> Tensor:
    if kind == "blob":
        coarse = torch.rand(batch, 1, math.ceil(height / 4), math.ceil(width / 4), generator=generator)
        noise = F.interpolate(coarse, size=(height, width), mode="bicubic").flatten(1)
    else:
        noise = torch.rand(batch, height * width, generator=generator)
    count = max(1, round(density * height * width))
    active = torch.zeros_like(noise, dtype=torch.bool).scatter_(1, noise.topk(count).indices, True)
    return active.view(batch, 1, height, width)


def dilated(mask: Tensor) -> Tensor:
    """The 3x3 neighbourhood of a bool map (B, 1, H, W)."""
    return F.max_pool2d(mask.float(), 3, 1, 1) > 0


def share(maps: Sequence[Tensor]) -> float:
    """Active positions / positions."""
    return sum(int(mask.sum()) for mask in maps) / sum(mask.numel() for mask in maps)


def block_macs(maps: Sequence[Tensor]) -> float:
    """Multiply-adds of a two-convolution block at these positions / at all: the first runs on the neighbourhood."""
    return (share([dilated(mask) for mask in maps]) + share(maps)) / 2


def density_for(macs: float, kind: Mask, shapes: Sequence[Size], batch: int) -> float:
    """The density at which a block takes `macs` of its multiply-adds."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        if block_macs(masks(kind, middle, shapes, batch)) < macs:
            low = middle
        else:
            high = middle
    return high


class ForcedGates:
    """A gate activation that opens at given positions only; inside, gates still follow their logits.

    Args:
        mask: (P,) bool.
    """

    joint = False

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __call__(self, logits: Tensor, layout: RowLayout) -> Tensor:
        return logits.sigmoid() * self.mask

    def logit(self, openness: float) -> float:
        return math.log(openness / (1 - openness))
