"""The parameters of a convolution with its norm, in one value."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class ConvNorm(NamedTuple):
    """Parameters of a 3x3 convolution and the GroupNorm behind it.

    Attributes:
        weight: (O, C, 3, 3), or (C, 1, 3, 3) for a depthwise convolution.
        bias: (O,) of the convolution or None.
        scale: (O,) of the norm.
        shift: (O,) of the norm.
        groups: divides O.
        eps: added to the variance.
    """

    weight: Tensor
    bias: Tensor | None
    scale: Tensor
    shift: Tensor
    groups: int
    eps: float

    @classmethod
    def of(cls, conv: nn.Conv2d, norm: nn.GroupNorm) -> ConvNorm:
        return cls(conv.weight, conv.bias, norm.weight, norm.bias, norm.num_groups, norm.eps)

    def to(self, dtype: torch.dtype) -> ConvNorm:
        """With a convolution of another type; norms keep theirs."""
        return self._replace(weight=self.weight.to(dtype), bias=None if self.bias is None else self.bias.to(dtype))
