"""The necks of YOLOv7, YOLOv7-X and YOLOv7-W6 (Wang et al., CVPR 2023, arXiv:2207.02696).

A top-down and a bottom-up pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyndet.models.backbones.yolov7_blocks import ELAN, SPPCSPC, ConvNorm, RepConv, Transition, scaled, scaled_taps


class YoloNeck(nn.Module):
    """SPPCSPC on the coarsest map, ELANs downwards and upwards, and a last convolution on every level.

    Attributes:
        channels: C of every level, finest first: twice the width inside.
        strides: pixels per position of every level.
        size_divisor: the largest stride; sides of images are multiples of it, so that every map is half the one before.

    Args:
        in_channels: C of the backbone's maps, finest first.
        in_strides: their strides, each twice the one before.
        widths: C of every level inside.
        branches: C of the ELANs' branches on every level.
        taps: see `ELAN`.
        chain_ratio: C of the ELANs' chains as a share of their branches.
        downsample: between levels upwards: "pool" a `Transition`, "conv" a strided convolution.
        output: the last convolution: "rep" a `RepConv`, or "conv".
        width: factor on all channels.
        depth: factor on the length of the ELANs' chains.

    Raises:
        ValueError: if there are not as many widths and branches as maps.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        *,
        widths: Sequence[int] = (128, 256, 512),
        branches: Sequence[int] = (128, 256, 512),
        taps: Sequence[int] = (4, 3, 2, 1),
        chain_ratio: float = 0.5,
        downsample: Literal["pool", "conv"] = "pool",
        output: Literal["rep", "conv"] = "rep",
        width: float = 1.0,
        depth: float = 1.0,
    ) -> None:
        super().__init__()
        if not len(widths) == len(branches) == len(in_channels):
            raise ValueError(
                f"the backbone gives {len(in_channels)} maps: neck.widths and neck.branches need as many numbers, "
                f"have {len(widths)} and {len(branches)}"
            )
        if downsample not in ("pool", "conv") or output not in ("rep", "conv"):
            raise ValueError(f"downsample is pool or conv, output rep or conv, got {downsample!r} and {output!r}")
        inside = [scaled(number, width) for number in widths]
        self.strides = list(in_strides)
        self.size_divisor = self.strides[-1]
        self.channels = [2 * number for number in inside]

        def elan(in_channels: int, level: int) -> ELAN:
            branch = scaled(branches[level], width)
            chain = scaled(branches[level] * chain_ratio, width)
            return ELAN(in_channels, inside[level], width=branch, chain_width=chain, taps=scaled_taps(taps, depth))

        fine = range(len(inside) - 1)
        self.spp = SPPCSPC(in_channels[-1], inside[-1])
        self.laterals = nn.ModuleList(ConvNorm(in_channels[level], inside[level]) for level in fine)
        self.narrow = nn.ModuleList(ConvNorm(inside[level + 1], inside[level]) for level in fine)
        self.top_down = nn.ModuleList(elan(2 * inside[level], level) for level in fine)
        pool = downsample == "pool"
        self.down = nn.ModuleList(
            Transition(inside[level], inside[level]) if pool else ConvNorm(inside[level], inside[level + 1], 3, 2)
            for level in fine
        )
        halved = [2 * inside[level] if pool else inside[level + 1] for level in fine]
        self.bottom_up = nn.ModuleList(elan(halved[level] + inside[level + 1], level + 1) for level in fine)
        self.outputs = nn.ModuleList(
            RepConv(number, 2 * number) if output == "rep" else ConvNorm(number, 2 * number, 3) for number in inside
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C_l, H_l, W_l), each half the one before -> as many levels of the same sizes."""
        levels = [*features[:-1], self.spp(features[-1])]
        for level in reversed(range(len(levels) - 1)):
            coarser = F.interpolate(self.narrow[level](levels[level + 1]), scale_factor=2.0, mode="nearest")
            levels[level] = self.top_down[level](torch.cat([self.laterals[level](levels[level]), coarser], 1))
        for level, (down, elan) in enumerate(zip(self.down, self.bottom_up, strict=True)):
            levels[level + 1] = elan(torch.cat([down(levels[level]), levels[level + 1]], 1))
        return [output(x) for output, x in zip(self.outputs, levels, strict=True)]
