"""The two kinds of path inside a node of the fine-grained routing space, and how levels exchange features.

Source: Song et al., NeurIPS 2020, section 3.2, and the published code (basic block in the depth path, depthwise
convolution in the scale paths).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from dyndet.models.heads.init import init_normal
from dyndet.ops.conv import Impl, masked_conv
from dyndet.ops.masked_norm import masked_group_norm
from dyndet.structures import ConvCost


class ScalePath(nn.Module):
    """Depthwise 3x3 -> GroupNorm: what a level sends to a neighbour."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.GroupNorm(norm_groups, channels)
        init_normal(self)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); `mask` limits the norm's statistics to active positions."""
        return _norm(self.norm, self.conv(features), mask)

    def costs(self, *, published: bool) -> tuple[ConvCost, ...]:
        """Multiply-adds per position; the published table counts the convolution twice (spec: 4 864 for C = 256)."""
        conv = self.conv.weight.numel()
        return (ConvCost((2 if published else 1) * conv + self.norm.num_channels),)


class DepthPath(nn.Module):
    """Conv 3x3 -> GroupNorm -> ReLU -> conv 3x3 -> GroupNorm: the residual branch of a basic block."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(norm_groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(norm_groups, channels)
        init_normal(self)

    def forward(self, features: Tensor) -> Tensor:
        """Dense: (B, C, H, W) -> (B, C, H, W)."""
        return self.norm2(self.conv2(F.relu(self.norm1(self.conv1(features)))))

    def masked(self, features: Tensor, inner: Tensor, outer: Tensor, impl: Impl) -> Tensor:
        """On active positions: `outer` is where the output is wanted, `inner` its 3x3 neighbourhood (conv 1).

        Args:
            features: (B, C, H, W).
            inner: (B, 1, H, W) bool.
            outer: (B, 1, H, W) bool.
            impl: execution of `masked_conv`.

        Returns:
            (B, C, H, W), zero outside `outer`.
        """
        hidden = masked_conv(features, self.conv1.weight, mask=inner, impl=impl)
        hidden = F.relu(_norm(self.norm1, hidden, inner))
        outputs = masked_conv(hidden, self.conv2.weight, mask=outer, impl=impl)
        return _norm(self.norm2, outputs, outer)

    def costs(self) -> tuple[ConvCost, ...]:
        """Both convolutions with their norms; conv 1 runs on the 3x3 neighbourhood of what conv 2 computes (Eq. 4)."""
        macs = self.conv1.weight.numel() + self.norm1.num_channels
        return (ConvCost(macs, reach=1), ConvCost(macs, reach=0))


def _norm(norm: nn.GroupNorm, features: Tensor, mask: Tensor | None) -> Tensor:
    return masked_group_norm(features, norm.num_groups, norm.weight, norm.bias, mask=mask, eps=norm.eps)


def exchange(down: Sequence[Tensor], up: Sequence[Tensor]) -> list[Tensor | None]:
    """What each level receives from its neighbours.

    `down[l]` travels to the coarser level l + 1, `up[l]` to the finer level l - 1, resampled bilinearly to the exact
    target size with aligned corners, as published. The last `down` and the first `up` have no receiver.

    Returns:
        Per level the sum of what arrived, (B, C, H_l, W_l), or None where the pyramid has a single level.
    """
    received: list[Tensor | None] = []
    for level, features in enumerate(down):
        senders = [down[level - 1]] if level > 0 else []
        senders += [up[level + 1]] if level + 1 < len(up) else []
        resampled = [
            F.interpolate(sender, size=features.shape[-2:], mode="bilinear", align_corners=True) for sender in senders
        ]
        received.append(sum(resampled[1:], resampled[0]) if resampled else None)
    return received
