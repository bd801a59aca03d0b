"""The scale-aware and the task-aware attention of DyHead (Dai et al., CVPR 2021, arXiv:2106.08322, Eq. 3, 5)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyndet.models.heads.init import fill_bias


def masked_mean(inputs: Tensor, valid: Tensor | None) -> Tensor:
    """(B, C, H, W) -> (B, C) mean over the positions that `valid`, (B, 1, H, W) bool, marks; over all without."""
    if valid is None:
        return inputs.mean((2, 3))
    return (inputs * valid).sum((2, 3)) / valid.sum((2, 3)).clamp(min=1)


class ScaleAttention(nn.Module):
    """How much a map counts: hard sigmoid(ReLU(w . mean + b)), so always between 0.5 and 1.

    The paper prints max(0, min(1, (x + 1) / 2)); released weights need max(0, min(1, (x + 3) / 6)), after a ReLU.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, 1)
        nn.init.normal_(self.conv.weight, std=0.01)
        fill_bias(self.conv, 0.0)

    def forward(self, inputs: Tensor, valid: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, 1, 1, 1)."""
        mean = masked_mean(inputs, valid).to(self.conv.weight.dtype)
        return F.hardsigmoid(F.relu(self.conv(mean[:, :, None, None])))


class TaskAttention(nn.Module):
    """DyReLU (Chen et al., ECCV 2020, arXiv:2003.10027): the larger of two lines per image and channel, whose
    coefficients follow from the map's mean.

    out = max(a1 x + b1, a2 x + b2) with a1 = 1 + 2 t1, b1 = t2, a2 = 2 t3, b2 = t4 and t in [-0.5, 0.5]; all t = 0 is
    the ordinary ReLU.

    Args:
        channels: C, a multiple of `reduction`.
        reduction: C / C of the hidden layer.
        init: of both linear layers: "normal" (std 0.01, bias 0) or "default" (torch's).
    """

    def __init__(self, channels: int, *, reduction: int = 4, init: Literal["normal", "default"] = "normal") -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // reduction)
        self.excite = nn.Linear(channels // reduction, 4 * channels)
        if init == "normal":
            for layer in (self.squeeze, self.excite):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)

    def forward(self, inputs: Tensor, valid: Tensor | None) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        mean = masked_mean(inputs, valid).to(self.squeeze.weight.dtype)
        t = F.hardsigmoid(self.excite(F.relu(self.squeeze(mean)))) - 0.5
        slope1, shift1, slope2, shift2 = t[:, :, None, None].chunk(4, 1)
        return torch.maximum((1 + 2 * slope1) * inputs + shift1, 2 * slope2 * inputs + shift2)
