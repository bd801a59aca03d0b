"""The simple feature pyramid of a plain ViT (Li et al., ViTDet, ECCV 2022, arXiv:2203.16527)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class SimplePyramid(nn.Module):
    """Every level from one and the same map, without passes between levels.

    Finer levels by transposed 2x2 convolutions that halve the channels, with norm and GELU between two; coarser ones by
    max-pooling; then on each a 1x1 and a 3x3 convolution, each with its norm. Norms are over the channels.

    Attributes:
        channels: C of every level.
        strides: pixels per position of every level.

    Args:
        in_channels: C of the backbone's map, a single one.
        in_strides: its stride, 16 for the ViTs of the paper.
        channels: C of the pyramid.
        strides: of the levels, each twice the one before.
        extra_levels: how many levels to add, each of every second position of the level before.

    Raises:
        ValueError: if there are several maps, or levels that the map's stride does not become by doubling or halving.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        *,
        channels: int = 256,
        strides: Sequence[int] = (4, 8, 16, 32),
        extra_levels: int = 1,
    ) -> None:
        super().__init__()
        if len(in_channels) != 1:
            raise ValueError(
                f"SimplePyramid reads one map, the backbone gives {len(in_channels)}: set backbone.strides to one "
                "stride, [16] for most ViTs, or take neck=fpn"
            )
        stride = in_strides[0]
        doubled = [strides[0] * 2**level for level in range(len(strides))]
        if list(strides) != doubled or not _power_of_two(max(stride, doubled[0]), min(stride, doubled[0])):
            raise ValueError(
                f"neck.strides={list(strides)} must double from level to level and meet the backbone's {stride}: set "
                f"neck.strides={[stride // 2, stride, stride * 2]}, for instance"
            )
        self.levels = nn.ModuleList(_level(in_channels[0], channels, stride, target) for target in strides)
        self.extra = nn.ModuleList(nn.MaxPool2d(1, stride=2) for _ in range(extra_levels))
        self.channels = channels
        self.strides = [*strides, *(strides[-1] * 2 ** (level + 1) for level in range(extra_levels))]

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """One map (B, C_in, H, W) -> (B, C, H_l, W_l), coarsest last.

        Finer levels have exactly twice the positions of the next, coarser ones half, rounded up: they cover what the
        map does, whole patches.
        """
        (x,) = features
        pyramid = [level(x) for level in self.levels]
        for halve in self.extra:
            pyramid.append(halve(pyramid[-1]))
        return pyramid


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of every position, in the dtype of its input."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).to(input.dtype)


def _level(in_channels: int, channels: int, stride: int, target: int) -> nn.Sequential:
    """From the map's stride to the target, then the two convolutions."""
    layers: list[nn.Module] = []
    width = in_channels
    while stride > target:
        if layers:
            layers += [ChannelNorm(width), nn.GELU()]
        layers.append(nn.ConvTranspose2d(width, width // 2, 2, stride=2))
        stride, width = stride // 2, width // 2
    if target > stride:
        layers.append(nn.MaxPool2d(target // stride, ceil_mode=True))
    return nn.Sequential(
        *layers,
        nn.Conv2d(width, channels, 1, bias=False),
        ChannelNorm(channels),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        ChannelNorm(channels),
    )


def _power_of_two(large: int, small: int) -> bool:
    ratio = large // small
    return large % small == 0 and ratio & (ratio - 1) == 0
