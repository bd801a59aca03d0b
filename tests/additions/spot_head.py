"""A dynamic head of one's own: one gated convolution, drawn, priced, timed and calibrated like any other."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from dyndet.routing import GatedPath, LayerCost, Routing
from dyndet.structures import HeadOutput


class SpotHead(nn.Module):
    """y = ReLU(x + g conv(x)), with a gate g per position that reads x."""

    gate_threshold = 0.0

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Conv2d(channels, 1, 1)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        cost = LayerCost(macs=self.conv.weight.numel())
        self.path = GatedPath("spot", "conv", (cost,), router_macs=self.gate.weight.numel())

    def close_below(self, threshold: float) -> None:
        self.gate_threshold = threshold

    def forward(self, features: Sequence[Tensor], valid: Sequence[Tensor] | None = None) -> HeadOutput:
        gates = [self.gate(x).sigmoid() for x in features]
        gates = [g * (g > self.gate_threshold) for g in gates]
        gates = gates if valid is None else [g * area for g, area in zip(gates, valid, strict=True)]
        maps = [F.relu(x + g * self.conv(x)) for x, g in zip(features, gates, strict=True)]
        return HeadOutput(maps, maps, Routing.of([self.path], gates, valid))
