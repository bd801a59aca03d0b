"""Positions of a feature pyramid: which are valid, and where they lie in the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dyndet.structures import Size


def valid_masks(sizes: Tensor, shapes: Sequence[Size], strides: Sequence[int]) -> list[Tensor] | None:
    """Which positions of each level lie on an image rather than on padding.

    Args:
        sizes: (B, 2) valid H, W in pixels, on the CPU.
        shapes: (H_l, W_l) of every level.
        strides: pixels per position of every level.

    Returns:
        Per level (B, 1, H_l, W_l) bool on the CPU; None when no image has padding (nothing to mask).
    """
    masks = []
    padded = False
    for (height, width), stride in zip(shapes, strides, strict=True):
        rows = (torch.arange(height) * stride)[None] < sizes[:, :1]
        columns = (torch.arange(width) * stride)[None] < sizes[:, 1:]
        mask = (rows[:, :, None] & columns[:, None, :])[:, None]
        padded = padded or not bool(mask.all())
        masks.append(mask)
    return masks if padded else None


def level_points(shape: Size, stride: int, offset: float, device: torch.device) -> Tensor:
    """(H*W, 2) x, y in pixels of a level's positions, row-major; `offset` in strides (0 corner, 0.5 centre)."""
    height, width = shape
    y = (torch.arange(height, device=device, dtype=torch.float32) + offset) * stride
    x = (torch.arange(width, device=device, dtype=torch.float32) + offset) * stride
    grid = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([grid[1].flatten(), grid[0].flatten()], 1)
