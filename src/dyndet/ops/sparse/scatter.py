"""Rows back to the map, as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from dyndet.ops.sparse.plan import Plan


def scatter_rows(x: Tensor, plan: Plan) -> Tensor:
    """(capacity + 1, C) rows of a plan -> (P + 1, C) rows of the map, zero where the plan has none."""
    if plan.whole:
        return x
    nothing = plan.inverse == plan.capacity
    # Rows that are undefined may hold anything, so they are replaced rather than multiplied away.
    return torch.where(nothing[:, None], x.new_zeros(()), x.index_select(0, plan.inverse))
