"""Convolution of the map to very few channels: the logits of gates, in plain torch on every device.

A convolution to one or two channels starves on small vectors. Here one matrix product takes all taps at every
position, and every position then adds up what its neighbours hold for it.

No operator of its own: what it computes depends on no gate, and torch differentiates it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dyndet.layout import RowLayout


def gate_logits(x: Tensor, weight: Tensor, layout: RowLayout) -> Tensor:
    """Same-size convolution of map rows to a few channels.

    Args:
        x: (P + 1, C) rows of the map, the last one zero.
        weight: (O, C, k, k), k = 1 or 3.
        layout: of the rows.

    Returns:
        (O, P), at least float32.
    """
    kernel = weight.shape[-1]
    taps = (
        weight.flip(2, 3).permute(0, 2, 3, 1).reshape(-1, weight.shape[1]).to(x.dtype)
    )  # what q adds to p is tap q - p of p
    positions, _ = x.split([layout.positions, 1])  # unlike a slice, one pass in the backward direction
    products = F.linear(positions, taps).t()
    products = products.to(torch.promote_types(products.dtype, torch.float32))
    levels = [
        F.fold(level.flatten(2), level.shape[2:], kernel, padding=kernel // 2) for level in layout.unflat(products)
    ]
    return layout.flat(levels)
