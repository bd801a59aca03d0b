"""No head at all: the pyramid goes on as it is."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dyndet.models.detectors.base import Branch
from dyndet.models.heads.branches import BRANCHES, check_branches
from dyndet.structures import HeadOutput


class NoHead(nn.Module):
    """Has no parameters and costs nothing.

    Args:
        channels: C of the pyramid, which every head is told; nothing depends on it.
        branches: under which names the pyramid goes on.
    """

    def __init__(self, channels: int | None = None, *, branches: Sequence[Branch] = BRANCHES) -> None:
        super().__init__()
        self.branches = check_branches(branches)

    def forward(self, features: Sequence[Tensor], valid: Sequence[Tensor] | None = None) -> HeadOutput:
        """L x (B, C, H, W) -> the same maps for every purpose; 0 where `valid`, L x (B, 1, H, W), marks padding."""
        maps = list(features) if valid is None else [x * mask for x, mask in zip(features, valid, strict=True)]
        return HeadOutput.of(dict.fromkeys(self.branches, maps))
