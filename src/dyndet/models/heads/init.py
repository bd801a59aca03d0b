"""How the convolutions of heads and predictors start."""

from __future__ import annotations

from torch import nn


def init_normal(module: nn.Module, std: float = 0.01) -> None:
    """Every convolution inside: weights normal(0, std), bias 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
