"""Feature pyramid network (Lin et al., CVPR 2017, arXiv:1612.03144).

With the extra levels of FCOS and RetinaNet, or of Faster R-CNN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from dyndet.models.heads.init import fill_bias


class FPN(nn.Module):
    """1x1 laterals, nearest top-down, 3x3 outputs, and extra levels by strided convolutions or pooling.

    Attributes:
        channels: C of every level.
        strides: pixels per position of every level.

    Args:
        in_channels: C of the backbone's maps, finest first.
        in_strides: their strides.
        channels: C of the pyramid.
        extra_levels: how many levels to add, each of half the resolution (2 gives P6 and P7).
        extra: by "conv", 3x3 of stride 2, or by "pool", every second position of the level before (two-stage
            detectors), which always starts from the last pyramid level.
        extra_source: the first convolution reads the last backbone map ("C5": the published code) or the last pyramid
            level ("P5": the paper's parameter counts).
        relu_before_extra: ReLU between the convolutions (P7 reads ReLU(P6)).
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        *,
        channels: int = 256,
        extra_levels: int = 2,
        extra: Literal["conv", "pool"] = "conv",
        extra_source: Literal["C5", "P5"] = "C5",
        relu_before_extra: bool = True,
    ) -> None:
        super().__init__()
        if extra not in ("conv", "pool"):
            raise ValueError(f"extra must be 'conv' or 'pool', got {extra!r}")
        if extra_source not in ("C5", "P5"):
            raise ValueError(f"extra_source must be 'C5' or 'P5', got {extra_source!r}")
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        self.from_backbone = extra_source == "C5" and extra == "conv"
        first = in_channels[-1] if self.from_backbone else channels
        self.extra = nn.ModuleList(
            nn.Conv2d(channels if i else first, channels, 3, stride=2, padding=1)
            if extra == "conv"
            else nn.MaxPool2d(1, stride=2)
            for i in range(extra_levels)
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_uniform_(layer.weight, a=1)  # Caffe2's Xavier
                fill_bias(layer, 0.0)
        self.channels = channels
        self.strides = [*in_strides, *(in_strides[-1] * 2 ** (i + 1) for i in range(extra_levels))]
        self.relu_before_extra = relu_before_extra and extra == "conv"

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """L x (B, C_l, H_l, W_l) -> (L + extra_levels) x (B, C, H_l, W_l)."""
        summed = [lateral(x) for lateral, x in zip(self.lateral, features, strict=True)]
        for level in range(len(summed) - 2, -1, -1):
            finer = summed[level]
            summed[level] = finer + F.interpolate(summed[level + 1], size=finer.shape[-2:], mode="nearest")
        pyramid = [output(x) for output, x in zip(self.output, summed, strict=True)]
        x = features[-1] if self.from_backbone else pyramid[-1]
        for index, halve in enumerate(self.extra):
            x = halve(F.relu(x) if index and self.relu_before_extra else x)
            pyramid.append(x)
        return pyramid
