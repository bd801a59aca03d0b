"""The two kinds of path inside a node of the fine-grained routing space, and how levels exchange features.

Source: Song et al., NeurIPS 2020, arXiv:2012.03519, section 3.2, and the published code (basic block in the depth path,
depthwise convolution in the scale paths).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from dyndet.models.heads.init import init_normal
from dyndet.ops.masked_norm import masked_group_norm
from dyndet.ops.sparse import ConvNorm, Impl, Plan, Stats, conv_work, depth_rows
from dyndet.routing import LayerCost, Work


class ScalePath(nn.Module):
    """Depthwise 3x3 -> GroupNorm: what a level sends to a neighbour."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.GroupNorm(norm_groups, channels)
        init_normal(self)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """One level, dense: (B, C, H, W) -> (B, C, H, W); `mask` limits the norm's statistics."""
        return _norm(self.norm, self.conv(features), mask)

    @property
    def conv_norm(self) -> ConvNorm:
        """What `scale_rows` computes, sparse and gated."""
        return ConvNorm.of(self.conv, self.norm)

    def costs(self, *, published: bool) -> tuple[LayerCost, ...]:
        """Multiply-adds per position; the published table counts the convolution twice (spec: 4 864 for C = 256)."""
        conv = self.conv.weight.numel()
        return (LayerCost((2 if published else 1) * conv + self.norm.num_channels),)


class DepthPath(nn.Module):
    """Conv 3x3 -> GroupNorm -> ReLU -> conv 3x3 -> GroupNorm: the residual branch of a basic block."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(norm_groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(norm_groups, channels)
        init_normal(self)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """One level, dense: (B, C, H, W) -> (B, C, H, W); with a mask, zero and unseen by the norms outside it."""
        hidden = F.relu(_norm(self.norm1, self.conv1(features), mask))
        return _norm(self.norm2, self.conv2(hidden), mask)

    def gated(
        self, rows: Tensor, gate: Tensor, inner: Plan, outer: Plan, *, stats: Stats, impl: Impl
    ) -> tuple[Tensor, list[Work]]:
        """All levels, at the positions of two plans: ReLU(rows + gate * path(rows)).

        Args:
            rows: (P + 1, C) rows of the pyramid.
            gate: (P,) what the path is multiplied by.
            inner: where convolution 1 runs, the 3x3 neighbourhood of `outer`.
            outer: where convolution 2 runs.
            stats: see `norm_rows`.
            impl: execution.

        Returns:
            (P + 1, C) and the work done.
        """
        first, second = ConvNorm.of(self.conv1, self.norm1), ConvNorm.of(self.conv2, self.norm2)
        outputs = depth_rows(rows, first, second, gate, inner, outer, stats=stats, impl=impl)
        work = [
            conv_work(rows, part.weight, target=plan, impl=impl) for part, plan in ((first, inner), (second, outer))
        ]
        return outputs, work

    def costs(self) -> tuple[LayerCost, ...]:
        """Both convolutions with their norms; conv 1 runs on the 3x3 neighbourhood of what conv 2 computes (Eq. 4)."""
        macs = self.conv1.weight.numel() + self.norm1.num_channels
        return (LayerCost(macs, reach=1), LayerCost(macs, reach=0))


def _norm(norm: nn.GroupNorm, features: Tensor, mask: Tensor | None) -> Tensor:
    return masked_group_norm(features, norm.num_groups, norm.weight, norm.bias, mask=mask, eps=norm.eps)


def exchange(down: Sequence[Tensor], up: Sequence[Tensor]) -> list[Tensor] | None:
    """What each level receives from its neighbours.

    `down[l]` travels to the coarser level l + 1, `up[l]` to the finer level l - 1, resampled bilinearly to the exact
    target size with aligned corners, as published. The last `down` and the first `up` have no receiver.

    Returns:
        Per level the sum of what arrived, (B, C, H_l, W_l); None when the pyramid has a single level.
    """
    if len(down) == 1:
        return None
    received: list[Tensor] = []
    for level, features in enumerate(down):
        senders = [down[level - 1]] if level > 0 else []
        senders += [up[level + 1]] if level + 1 < len(up) else []
        resampled = [
            F.interpolate(sender, size=features.shape[-2:], mode="bilinear", align_corners=True) for sender in senders
        ]
        received.append(sum(resampled[1:], resampled[0]))
    return received
