"""The two kinds of path inside a node of the fine-grained routing space.

Source: Song et al., NeurIPS 2020, arXiv:2012.03519, section 3.2, and the published code (basic block in the depth path,
depthwise convolution in the scale paths).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dyndet.models.heads.init import init_normal
from dyndet.ops import sparse
from dyndet.ops.masked_norm import masked_group_norm
from dyndet.ops.sparse import Impl, Norm, Plan, Stats
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

    def gated(self, rows: Tensor, gate: Tensor, plan: Plan, *, stats: Stats, impl: Impl) -> tuple[Tensor, Work]:
        """All levels, at the positions of a plan: gate * path(rows), zero elsewhere.

        Args:
            rows: (P + 1, C) rows of the pyramid.
            gate: (P,) what the path is multiplied by.
            plan: where the path is computed.
            stats: see `Norm`.
            impl: execution.

        Returns:
            (P + 1, C) and the work done.
        """
        whole, weight = sparse.whole_plan(plan.layout), self.conv.weight
        hidden = sparse.conv(rows, weight, self.conv.bias, source=whole, target=plan, impl=impl)
        outputs = sparse.scatter_add(hidden, Norm.of(self.norm, stats), gate, plan=plan, impl=impl)
        return outputs, sparse.conv_work(rows, weight, target=plan, impl=impl)

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
            stats: see `Norm`.
            impl: execution.

        Returns:
            (P + 1, C) and the work done.
        """
        norms = Norm.of(self.norm1, stats), Norm.of(self.norm2, stats)
        first, second, whole = self.conv1.weight, self.conv2.weight, sparse.whole_plan(inner.layout)
        hidden = sparse.conv(rows, first, source=whole, target=inner, norm=norms[0], relu=True, impl=impl)
        hidden = sparse.conv(hidden, second, source=inner, target=outer, impl=impl)
        outputs = sparse.scatter_add(hidden, norms[1], gate, residual=rows, plan=outer, relu=True, impl=impl)
        work = [
            sparse.conv_work(rows, weight, target=plan, impl=impl) for weight, plan in ((first, inner), (second, outer))
        ]
        return outputs, work

    def costs(self) -> tuple[LayerCost, ...]:
        """Both convolutions with their norms; conv 1 runs on the 3x3 neighbourhood of what conv 2 computes (Eq. 4)."""
        macs = self.conv1.weight.numel() + self.norm1.num_channels
        return (LayerCost(macs, reach=1), LayerCost(macs, reach=0))


def _norm(norm: nn.GroupNorm, features: Tensor, mask: Tensor | None) -> Tensor:
    return masked_group_norm(features, norm.num_groups, norm.weight, norm.bias, mask=mask, eps=norm.eps)
