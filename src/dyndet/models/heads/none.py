"""No head at all: the pyramid goes on as it is."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dyndet.structures import HeadOutput


class NoHead(nn.Module):
    """Has no parameters and costs nothing.

    Args:
        channels: C of the pyramid, which every head is told; nothing depends on it.
    """

    def __init__(self, channels: int | None = None) -> None:
        super().__init__()

    def forward(self, features: Sequence[Tensor], valid: Sequence[Tensor] | None = None) -> HeadOutput:
        """L x (B, C, H, W) -> the same maps for both purposes; 0 where `valid`, L x (B, 1, H, W), marks padding."""
        maps = list(features) if valid is None else [x * mask for x, mask in zip(features, valid, strict=True)]
        return HeadOutput(maps, maps)
