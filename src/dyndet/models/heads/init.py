"""How the layers of heads and predictors start."""

from __future__ import annotations

from torch import nn


def init_normal(module: nn.Module, std: float = 0.01) -> None:
    """Every convolution inside: weights normal(0, std), bias 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=std)
            fill_bias(layer, 0.0)


def fill_bias(conv: nn.Conv2d, value: float) -> None:
    """Sets the bias of a convolution, where it has one."""
    if conv.bias is not None:
        nn.init.constant_(conv.bias, value)


def check_groups(channels: int, groups: int, key: str) -> None:
    """GroupNorm divides the channels evenly.

    Args:
        channels: of the pyramid.
        groups: to divide them into.
        key: what sets them, for the message.

    Raises:
        ValueError: if it cannot.
    """
    if groups < 1 or channels % groups:
        raise ValueError(f"{key}={groups} must divide the channels of the neck, {channels}: change it or neck.channels")
