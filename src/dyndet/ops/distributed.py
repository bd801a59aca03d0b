"""The one collective that losses need."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def reduce_mean(value: Tensor) -> Tensor:
    """Mean of a scalar over all processes; the value itself in a single process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()
