"""The ordinary head: two towers of convolutions, shared by all levels. No routing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from dyndet.models.detectors.base import Branch
from dyndet.models.heads.branches import BRANCHES, check_branches
from dyndet.models.heads.init import check_groups, init_normal
from dyndet.ops.masked_norm import masked_group_norm
from dyndet.structures import HeadOutput


class PlainHead(nn.Module):
    """`num_convs` x [3x3 conv, GroupNorm, ReLU] for classification and as many for regression (FCOS, RetinaNet).

    Args:
        channels: C of the pyramid.
        num_convs: convolutions per tower (4 in the papers).
        norm_groups: groups of GroupNorm; 0 leaves the norm out (RetinaNet).
        ignore_padding: norms see the valid positions only, and padding stays zero; False as published.
        conv_bias: convolutions have a bias although a norm follows (not in mmdetection's ATSS and plain FCOS).
        branches: which to build and run, see `Predictor.reads`.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_convs: int = 4,
        norm_groups: int = 32,
        conv_bias: bool = True,
        ignore_padding: bool = True,
        branches: Sequence[Branch] = BRANCHES,
    ) -> None:
        super().__init__()
        if norm_groups:
            check_groups(channels, norm_groups, "norm_groups")
        self.ignore_padding = ignore_padding
        self.branches = check_branches(branches)
        for branch in self.branches:
            self.add_module(branch, _tower(channels, num_convs, norm_groups, conv_bias))

    def forward(self, features: Sequence[Tensor], valid: Sequence[Tensor] | None = None) -> HeadOutput:
        """Pyramid of L x (B, C, H, W) -> features of every branch, of the same shapes.

        Norms see the positions that `valid`, L x (B, 1, H, W), marks: the result does not depend on padding.
        """
        areas: Sequence[Tensor | None] = valid if valid and self.ignore_padding else [None] * len(features)
        towers = {branch: cast(nn.Sequential, getattr(self, branch)) for branch in self.branches}
        return HeadOutput.of(
            {
                branch: [_run(tower, x, area) for x, area in zip(features, areas, strict=True)]
                for branch, tower in towers.items()
            }
        )


def _run(tower: nn.Sequential, x: Tensor, valid: Tensor | None) -> Tensor:
    for layer in tower:
        if valid is not None and isinstance(layer, nn.GroupNorm):
            x = masked_group_norm(x, layer.num_groups, layer.weight, layer.bias, mask=valid, eps=layer.eps)
        else:
            x = layer(x)
    return x if valid is None else x * valid


def _tower(channels: int, num_convs: int, norm_groups: int, bias: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(num_convs):
        layers.append(nn.Conv2d(channels, channels, 3, padding=1, bias=bias))
        if norm_groups:
            layers.append(nn.GroupNorm(norm_groups, channels))
        layers.append(nn.ReLU())
    tower = nn.Sequential(*layers)
    init_normal(tower)
    return tower
