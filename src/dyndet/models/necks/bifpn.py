"""Bidirectional feature pyramid network (Tan et al., EfficientDet, CVPR 2020, arXiv:1911.09070)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyndet.models.heads.separable import SeparableConv, batch_norm, init_unit

Kind = Literal["fast", "softmax", "sum"]


class BiFPN(nn.Module):
    """Layers of a top-down and a bottom-up pass over the levels, each of which fuses maps with learned weights.

    Levels beyond the backbone's come from its last map: 1x1 convolution, then max-pooling.

    Attributes:
        channels: C of every level.
        strides: pixels per position of every level.

    Args:
        in_channels: C of the backbone's maps, finest first.
        in_strides: their strides, each twice the one before.
        channels: C of the pyramid.
        num_layers: how often the levels exchange.
        num_levels: of the pyramid, at least as many as the backbone's maps.
        fusion: see `Fusion`.

    Raises:
        ValueError: if the strides do not double, there are fewer levels than maps or than two, or the fusion is
            unknown.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        *,
        channels: int = 88,
        num_layers: int = 4,
        num_levels: int = 5,
        fusion: Kind = "fast",
    ) -> None:
        super().__init__()
        self.strides = [in_strides[0] * 2**level for level in range(num_levels)]
        if num_levels < 2 or self.strides[: len(in_strides)] != list(in_strides):
            raise ValueError(
                f"BiFPN with num_levels={num_levels} has strides {self.strides}, which the backbone's "
                f"{list(in_strides)} must begin: set backbone.strides or neck.num_levels"
            )
        self.channels = channels
        # Both passes of the first layer read the backbone's maps, each through a convolution of its own.
        self.top_down_inputs = nn.ModuleList(_lateral(c, channels) for c in in_channels)
        self.bottom_up_inputs = nn.ModuleList(_lateral(c, channels) for c in in_channels[1:])
        self.extra = _lateral(in_channels[-1], channels) if num_levels > len(in_channels) else nn.Identity()
        self.layers = nn.ModuleList(BiFPNLayer(channels, num_levels, fusion) for _ in range(num_layers))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C_l, H_l, W_l), H_l = ceil(H_{l-1} / 2) -> `num_levels` x (B, C, H_l, W_l)."""
        x, extra = self.extra(features[-1]), []
        for _ in range(len(self.strides) - len(features)):
            x = _half(x)
            extra.append(x)
        down = [lateral(x) for lateral, x in zip(self.top_down_inputs, features, strict=True)] + extra
        up = [lateral(x) for lateral, x in zip(self.bottom_up_inputs, features[1:], strict=True)] + extra
        for layer in self.layers:
            down = layer(down, up)
            up = down[1:]
        return down


class BiFPNLayer(nn.Module):
    """One top-down and one bottom-up pass; the paper's figure 2 (d)."""

    def __init__(self, channels: int, num_levels: int, fusion: Kind) -> None:
        super().__init__()
        self.top_down = nn.ModuleList(Node(2, channels, fusion) for _ in range(num_levels - 1))
        self.bottom_up = nn.ModuleList(
            Node(2 if level == num_levels - 1 else 3, channels, fusion) for level in range(1, num_levels)
        )

    def forward(self, down: Sequence[Tensor], up: Sequence[Tensor]) -> list[Tensor]:
        """The levels as the two passes read them, `up` without the finest -> the levels, L x (B, C, H, W)."""
        middle = list(down)
        for level in range(len(down) - 2, -1, -1):
            coarser = F.interpolate(middle[level + 1], size=down[level].shape[-2:], mode="nearest")
            middle[level] = self.top_down[level]([down[level], coarser])
        outputs = [middle[0]]
        for level in range(1, len(down)):
            between = [middle[level]] if level < len(down) - 1 else []
            outputs.append(self.bottom_up[level - 1]([up[level - 1], *between, _half(outputs[-1])]))
        return outputs


class Node(nn.Module):
    """Fusion, swish, depthwise-separable 3x3 convolution, batch norm."""

    def __init__(self, num_inputs: int, channels: int, fusion: Kind) -> None:
        super().__init__()
        self.fusion = Fusion(num_inputs, fusion)
        self.conv = SeparableConv(channels)
        self.norm = batch_norm(channels)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Maps of one shape -> one of this shape."""
        return self.norm(self.conv(F.silu(self.fusion(inputs))))


class Fusion(nn.Module):
    """Weighted sum of maps of one shape; weights start at 1.

    Args:
        num_inputs: how many maps.
        kind: "fast" relu(w_i) / (sum of relu(w_j) + 1e-4), the paper's choice; "softmax" over w; "sum" without weights.
    """

    def __init__(self, num_inputs: int, kind: Kind) -> None:
        super().__init__()
        if kind not in ("fast", "softmax", "sum"):
            raise ValueError(f"fusion must be fast, softmax or sum, got {kind!r}")
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(num_inputs)) if kind != "sum" else None

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Maps (B, C, H, W) -> (B, C, H, W)."""
        if self.weight is None:
            return reduce(torch.add, inputs)
        if self.kind == "fast":
            positive = F.relu(self.weight)
            shares = positive / (positive.sum() + 1e-4)
        else:
            shares = self.weight.softmax(0)
        return reduce(torch.add, [share * x for share, x in zip(shares.to(inputs[0].dtype), inputs, strict=True)])


def _lateral(in_channels: int, channels: int) -> nn.Module:
    if in_channels == channels:
        return nn.Identity()
    lateral = nn.Sequential(nn.Conv2d(in_channels, channels, 1, bias=False), batch_norm(channels))
    init_unit(lateral)
    return lateral


def _half(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2, padding=1)
