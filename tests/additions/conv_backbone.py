"""A backbone of one's own: anything that maps images to feature maps of known widths and strides."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


class ConvBackbone(nn.Module):
    """Strided 3x3 convolutions with ReLU: maps at strides 8, 16 and 32.

    Attributes:
        channels: of every map, finest first.
        strides: pixels per position of every map.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.strides = [8, 16, 32]
        self.channels = [4 * width, 8 * width, 16 * width]
        widths = [3, width, 2 * width, *self.channels]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU())
            for before, after in pairwise(widths)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> (B, C_l, ceil(H / stride_l), ceil(W / stride_l)) of every level."""
        maps = []
        for stage in self.stages:
            images = stage(images)
            maps.append(images)
        return maps[-len(self.strides) :]
