"""The blocks of YOLOv7 (Wang et al., CVPR 2023, arXiv:2207.02696)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, SiLU.

    Args:
        in_channels: C of the input.
        out_channels: C of the output.
        kernel: 1 or 3.
        stride: 1 or 2.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        self.norm = batch_norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, ceil(H / stride), ceil(W / stride))."""
        return F.silu(self.norm(self.conv(x)))

    def fused(self) -> nn.Module:
        """Without the norm, for inference."""
        return nn.Sequential(fuse_conv_bn_eval(self.conv, self.norm), nn.SiLU())


class ELAN(nn.Module):
    """Two 1x1 convolutions side by side, a chain of 3x3 from the second; some of its links are joined by a 1x1.

    Joined in this order: the taps from the deepest, then the second and the first branch.

    Args:
        in_channels: C of the input.
        out_channels: C of the output.
        width: C of both branches.
        chain_width: C of the chain.
        taps: which convolutions of the chain are joined, counted from 1, deepest first; the deepest is its end.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, width: int, chain_width: int, taps: Sequence[int]
    ) -> None:
        super().__init__()
        self.first = ConvNorm(in_channels, width)
        self.second = ConvNorm(in_channels, width)
        widths = [width] + [chain_width] * taps[0]
        self.chain = nn.ModuleList(ConvNorm(a, b, 3) for a, b in pairwise(widths))
        self.taps = list(taps)
        self.out = ConvNorm(len(taps) * chain_width + 2 * width, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H, W)."""
        links = [self.second(x)]
        for conv in self.chain:
            links.append(conv(links[-1]))
        return self.out(torch.cat([*(links[tap] for tap in self.taps), links[0], self.first(x)], 1))


class Transition(nn.Module):
    """Halves the resolution on two ways, a strided convolution and a max-pooling, and joins them in this order.

    Args:
        in_channels: C of the input.
        channels: C of either way; the output has twice as many.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.pooled = ConvNorm(in_channels, channels)
        self.before = ConvNorm(in_channels, channels)
        self.strided = ConvNorm(channels, channels, 3, 2)

    def forward(self, x: Tensor, convolved: Tensor | None = None) -> Tensor:
        """(B, C_in, H, W) -> (B, 2C, H/2, W/2); the way of the convolutions reads `convolved` instead where given."""
        strided = self.strided(self.before(x if convolved is None else convolved))
        return torch.cat([strided, self.pooled(F.max_pool2d(x, 2))], 1)


class SPPCSPC(nn.Module):
    """Max-pooling over 5, 9 and 13 pixels beside the map itself, between convolutions, next to a bypass.

    Args:
        in_channels: C of the input.
        channels: C of the output and of everything inside.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.before = nn.Sequential(
            ConvNorm(in_channels, channels), ConvNorm(channels, channels, 3), ConvNorm(channels, channels)
        )
        self.after = nn.Sequential(ConvNorm(4 * channels, channels), ConvNorm(channels, channels, 3))
        self.bypass = ConvNorm(in_channels, channels)
        self.out = ConvNorm(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, H, W)."""
        y = self.before(x)
        pooled = [F.max_pool2d(y, size, stride=1, padding=size // 2) for size in (5, 9, 13)]
        return self.out(torch.cat([self.after(torch.cat([y, *pooled], 1)), self.bypass(x)], 1))


class RepConv(nn.Module):
    """The sum of a 3x3 and a 1x1 convolution, each with its norm, then SiLU; folds into one 3x3 (RepVGG).

    Source: Ding et al., CVPR 2021, arXiv:2101.03697.

    Args:
        in_channels: C of the input.
        out_channels: C of the output, another number: with equal ones the published block has a third branch.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.wide_norm = batch_norm(out_channels)
        self.point = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.point_norm = batch_norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H, W)."""
        return F.silu(self.wide_norm(self.wide(x)) + self.point_norm(self.point(x)))

    @torch.no_grad()
    def fused(self) -> nn.Module:
        """One 3x3 convolution, for inference."""
        conv = fuse_conv_bn_eval(self.wide, self.wide_norm)
        point = fuse_conv_bn_eval(self.point, self.point_norm)
        assert conv.bias is not None and point.bias is not None
        conv.weight += F.pad(point.weight, (1, 1, 1, 1))
        conv.bias += point.bias
        return nn.Sequential(conv, nn.SiLU())


class SpaceToDepth(nn.Module):
    """(B, C, H, W) -> (B, 4C, H/2, W/2): the pixels of every 2x2 square, column by column, in channels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., row::2, column::2] for column in (0, 1) for row in (0, 1)], 1)


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """As these networks train it."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.03)


def scaled(channels: float, width: float) -> int:
    """`channels` times `width`, a multiple of 4."""
    return max(4, round(channels * width / 4) * 4)


def scaled_taps(taps: Sequence[int], depth: float) -> list[int]:
    """A chain `depth` times as long, tapped at the same shares of it."""
    return sorted({max(1, round(tap * depth)) for tap in taps}, reverse=True)
