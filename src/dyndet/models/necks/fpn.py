"""Feature pyramid network (Lin et al., CVPR 2017) with the two extra levels of FCOS and RetinaNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from dyndet.models.heads.init import fill_bias


class FPN(nn.Module):
    """1x1 laterals, nearest top-down, 3x3 outputs, and extra levels by strided convolutions.

    Attributes:
        channels: C of every level.
        strides: pixels per position of every level.

    Args:
        in_channels: C of the backbone's maps, finest first.
        in_strides: their strides.
        channels: C of the pyramid.
        extra_levels: how many levels to add by stride-2 3x3 convolutions (2 gives P6 and P7).
        extra_source: the first extra level reads the last backbone map ("C5": the published code) or the last pyramid
            level ("P5": the paper's parameter counts).
        relu_before_extra: ReLU between the extra levels (P7 reads ReLU(P6)).
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        *,
        channels: int = 256,
        extra_levels: int = 2,
        extra_source: Literal["C5", "P5"] = "C5",
        relu_before_extra: bool = True,
    ) -> None:
        super().__init__()
        if extra_source not in ("C5", "P5"):
            raise ValueError(f"extra_source must be 'C5' or 'P5', got {extra_source!r}")
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        first = in_channels[-1] if extra_source == "C5" else channels
        self.extra = nn.ModuleList(
            nn.Conv2d(first if i == 0 else channels, channels, 3, stride=2, padding=1) for i in range(extra_levels)
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_uniform_(layer.weight, a=1)  # Caffe2's Xavier
                fill_bias(layer, 0.0)
        self.channels = channels
        self.strides = [*in_strides, *(in_strides[-1] * 2 ** (i + 1) for i in range(extra_levels))]
        self.extra_source = extra_source
        self.relu_before_extra = relu_before_extra

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """L x (B, C_l, H_l, W_l) -> (L + extra_levels) x (B, C, H_l, W_l)."""
        summed = [lateral(x) for lateral, x in zip(self.lateral, features, strict=True)]
        for level in range(len(summed) - 2, -1, -1):
            finer = summed[level]
            summed[level] = finer + F.interpolate(summed[level + 1], size=finer.shape[-2:], mode="nearest")
        pyramid = [output(x) for output, x in zip(self.output, summed, strict=True)]
        x = features[-1] if self.extra_source == "C5" else pyramid[-1]
        for index, conv in enumerate(self.extra):
            x = conv(F.relu(x) if index and self.relu_before_extra else x)
            pyramid.append(x)
        return pyramid
