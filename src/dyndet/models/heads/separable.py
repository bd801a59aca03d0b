"""The head of EfficientDet (Tan et al., CVPR 2020, arXiv:1911.09070): towers of depthwise-separable convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from dyndet.errors import UserError
from dyndet.models.detectors.base import Branch
from dyndet.models.heads.branches import BRANCHES, check_branches
from dyndet.structures import HeadOutput


class SeparableConv(nn.Sequential):
    """A depthwise 3x3, then a 1x1 convolution, without bias: a norm follows."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.Conv2d(channels, channels, 1, bias=False),
        )
        init_unit(self)


class SeparableHead(nn.Module):
    """`num_convs` x [depthwise-separable 3x3 conv, batch norm, swish] for classification and as many for regression.

    Convolutions are shared by the levels, batch norms are each level's own.

    Args:
        channels: C of the pyramid.
        num_convs: convolutions per tower (3 in EfficientDet-D0 to D2).
        num_levels: of the pyramid.
        branches: which to build and run, see `Predictor.reads`.
    """

    def __init__(
        self, channels: int, *, num_convs: int = 3, num_levels: int = 5, branches: Sequence[Branch] = BRANCHES
    ) -> None:
        super().__init__()
        self.num_levels = num_levels
        self.branches = check_branches(branches)
        for branch in self.branches:
            self.add_module(branch, SeparableTower(channels, num_convs, num_levels))

    def forward(self, features: Sequence[Tensor], valid: Sequence[Tensor] | None = None) -> HeadOutput:
        """Pyramid of L x (B, C, H, W) -> features of every branch, of the same shapes.

        Norms see the positions that `valid`, L x (B, 1, H, W) bool, marks: the result does not depend on padding.

        Raises:
            UserError: on a pyramid of another number of levels.
        """
        if len(features) != self.num_levels:
            raise UserError(f"the pyramid has {len(features)} levels: set head.num_levels, now {self.num_levels}")
        areas: Sequence[Tensor | None] = valid or [None] * len(features)
        towers = {branch: getattr(self, branch) for branch in self.branches}
        return HeadOutput.of(
            {
                branch: [tower(x, level, area) for level, (x, area) in enumerate(zip(features, areas, strict=True))]
                for branch, tower in towers.items()
            }
        )


class SeparableTower(nn.Module):
    """One of the two towers."""

    def __init__(self, channels: int, num_convs: int, num_levels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(SeparableConv(channels) for _ in range(num_convs))
        self.norms = nn.ModuleList(
            nn.ModuleList(batch_norm(channels) for _ in range(num_convs)) for _ in range(num_levels)
        )

    def forward(self, x: Tensor, level: int, valid: Tensor | None) -> Tensor:
        """(B, C, H, W) of this level -> the same shape."""
        for conv, norm in zip(self.convs, self.norms[level], strict=True):  # type: ignore[arg-type]
            x = F.silu(_normalise(norm, conv(x), valid))
        return x


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """As the paper trains it: a decay of 0.99 and 0.001 added to the variance."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def init_unit(module: nn.Module) -> None:
    """Every convolution inside: outputs of the variance of their inputs, bias 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _normalise(norm: nn.Module, x: Tensor, valid: Tensor | None) -> Tensor:
    """Batch norm over the valid positions; 0 elsewhere."""
    if valid is None:
        return norm(x)
    if not norm.training:
        return norm(x) * valid
    places = valid[:, 0].nonzero(as_tuple=True)
    rows = x.movedim(1, -1)[places]
    normal = norm(rows[..., None, None])[..., 0, 0]
    return x.new_zeros(x.shape, dtype=normal.dtype).movedim(1, -1).index_put(places, normal).movedim(-1, 1)
