"""The static twin of the fine-grained head: the same nodes with every path always on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyndet.models.detectors.base import Branch
from dyndet.models.heads.branches import BRANCHES, check_branches
from dyndet.models.heads.init import check_groups
from dyndet.models.heads.paths import DepthPath, ScalePath
from dyndet.ops.sparse import received
from dyndet.structures import HeadOutput


class FixedNode(nn.Module):
    """Scale step, then depth step, without gates.

    Unlike the gated node the scale paths enter with weight 1 from the start (so published).
    """

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.down = ScalePath(channels, norm_groups)
        self.up = ScalePath(channels, norm_groups)
        self.output_weight = nn.Parameter(torch.ones(1))
        self.depth = DepthPath(channels, norm_groups)

    def forward(self, features: Sequence[Tensor], valid: Sequence[Tensor | None]) -> list[Tensor]:
        pairs = list(zip(features, valid, strict=True))
        arrived = received([self.down(x, area) for x, area in pairs], [self.up(x, area) for x, area in pairs])
        outputs = []
        for (x, area), other in zip(pairs, arrived, strict=True):
            s = self.output_weight * x + other
            outputs.append(F.relu(s + self.depth(s, area)))
        return outputs


class FixedHead(nn.Module):
    """Branches (classification, regression) of `depth` nodes each: "FCOS-D4", "FCOS-D8", the paper's fixed networks.

    Args:
        channels: C of the pyramid.
        depth: nodes per branch; a node holds two full 3x3 convolutions.
        norm_groups: groups of every GroupNorm.
        ignore_padding: norms see the valid positions only; False as published.
        branches: which to build and run, see `Predictor.reads`.
    """

    def __init__(
        self,
        channels: int,
        *,
        depth: int = 8,
        norm_groups: int = 32,
        ignore_padding: bool = True,
        branches: Sequence[Branch] = BRANCHES,
    ) -> None:
        super().__init__()
        check_groups(channels, norm_groups, "norm_groups")
        self.ignore_padding = ignore_padding
        self.branches = check_branches(branches)
        for branch in self.branches:
            self.add_module(branch, nn.ModuleList(FixedNode(channels, norm_groups) for _ in range(depth)))

    def forward(self, features: Sequence[Tensor], valid: Sequence[Tensor] | None = None) -> HeadOutput:
        """Pyramid of L x (B, C, H, W) -> features of every branch, of the same shapes.

        Norms see the positions that `valid`, L x (B, 1, H, W), marks: the result does not depend on padding.
        """
        areas: Sequence[Tensor | None] = valid if valid and self.ignore_padding else [None] * len(features)
        outputs: dict[str, list[Tensor]] = {}
        for branch in self.branches:
            maps = list(features)
            for node in getattr(self, branch):
                maps = node(maps, areas)
            outputs[branch] = maps
        return HeadOutput.of(outputs)
