"""Levels exchange features: every level adds what its neighbours sent, resampled to its size.

    s = own * x + scale * (down of the finer level + up of the coarser level)

No operator of its own: what it computes depends on no gate, and torch differentiates it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dyndet.layout import RowLayout


def exchange(x: Tensor, down: Tensor, up: Tensor, own: Tensor, scale: Tensor, layout: RowLayout) -> Tensor:
    """Adds to every level what its neighbours send.

    `down` of level l travels to the coarser level l + 1, `up` to the finer level l - 1, resampled bilinearly to the
    exact target size with aligned corners. The last `down` and the first `up` have no receiver.

    Args:
        x: (P + 1, C) rows of the pyramid.
        down: (P + 1, C) what goes to coarser levels.
        up: (P + 1, C) what goes to finer levels.
        own: (1,) weight of `x`.
        scale: (1,) weight of what arrives.
        layout: of the rows.

    Returns:
        (P + 1, C), the last row zero.
    """
    downs, ups, received = layout.maps(down), layout.maps(up), []
    for level, shape in enumerate(layout.shapes):
        senders = [*(downs[level - 1 : level] if level else []), *ups[level + 1 : level + 2]]
        arrived = [F.interpolate(sender, size=shape, mode="bilinear", align_corners=True) for sender in senders]
        received.append(sum(arrived[1:], arrived[0]) if arrived else downs[level].new_zeros(downs[level].shape))
    return torch.addcmul(x * own.to(x.dtype), layout.rows(received).to(x.dtype), scale.to(x.dtype))
