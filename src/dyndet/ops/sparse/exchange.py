"""Levels exchange features: every level adds what its neighbours sent, resampled to its size.

    s = own * x + (down of the finer level + up of the coarser level)

No operator of its own: what it computes depends on no gate, and torch differentiates it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from dyndet.layout import RowLayout


def received(down: Sequence[Tensor], up: Sequence[Tensor]) -> list[Tensor]:
    """What each level receives from its neighbours.

    `down[l]` travels to the coarser level l + 1, `up[l]` to the finer level l - 1, resampled bilinearly to the exact
    target size with aligned corners, as published. The last `down` and the first `up` have no receiver.

    Returns:
        Per level the sum of what arrived, (B, C, H_l, W_l); zeros in a pyramid of a single level.
    """
    sums = []
    for level, own in enumerate(down):
        senders = [*(down[level - 1 : level] if level else []), *up[level + 1 : level + 2]]
        arrived = [F.interpolate(x, size=own.shape[-2:], mode="bilinear", align_corners=True) for x in senders]
        sums.append(
            sum(arrived[1:], arrived[0]) if arrived else 0 * (own + up[level])
        )  # so that senders have gradients
    return sums


def exchange(x: Tensor, down: Tensor, up: Tensor, own: Tensor, layout: RowLayout) -> Tensor:
    """Adds to every level what it receives.

    Args:
        x: (P + 1, C) rows of the pyramid.
        down: (P + 1, C) what goes to coarser levels.
        up: (P + 1, C) what goes to finer levels.
        own: (1,) weight of `x`.
        layout: of the rows.

    Returns:
        (P + 1, C), the last row zero.
    """
    arrived = layout.rows(received(layout.maps(down), layout.maps(up))).to(x.dtype)
    return arrived.addcmul_(x, own.to(x.dtype))  # one pass
