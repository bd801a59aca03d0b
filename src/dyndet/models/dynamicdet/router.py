"""The adaptive router: how difficult is this image (DynamicDet, Lin et al., CVPR 2023, arXiv:2304.05552)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Router(nn.Module):
    """Average-pooled maps of the first backbone -> the logit of an image's difficulty.

    Difficulty says how much the second detector is needed, as in the paper. The published weights and thresholds are of
    easiness, 1 - difficulty: the last layer holds them as they are, and its output is negated.

    Args:
        stage_channels: C of every stage's output of the first backbone.
        first: the first stage that is read.
        reduction: the hidden layer has this many times fewer channels than are read.
        masked: pool over the image alone. The published router pools padding as well, so its scores depend on it.
    """

    def __init__(
        self, stage_channels: Sequence[int], *, first: int = 0, reduction: int = 4, masked: bool = False
    ) -> None:
        super().__init__()
        self.first = first
        self.masked = masked
        read = sum(stage_channels[first:])
        self.hidden = nn.Linear(read, read // reduction)
        self.out = nn.Linear(read // reduction, 1)

    def pool(self, sources: Sequence[Tensor], valid: Sequence[Tensor] | None = None) -> Tensor:
        """Outputs of all stages, (B, C_s, H_s, W_s) -> (B, sum of C_s) float32.

        Args:
            sources: of all stages.
            valid: of all stages (B, 1, H_s, W_s) bool, False on padding.
        """
        pooled = []
        for index, x in enumerate(sources[self.first :], self.first):
            if self.masked and valid is not None:
                mask = valid[index]
                pooled.append((x.float() * mask).sum((2, 3)) / mask.sum((2, 3)).clamp(min=1))
            else:
                pooled.append(x.float().mean((2, 3)))
        return torch.cat(pooled, 1)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, sum of C_s) -> (B,) difficulty logits. To be called outside autocast: rounded scores tie."""
        return -self.out(F.relu(self.hidden(pooled.to(self.hidden.weight.dtype))))[:, 0]
