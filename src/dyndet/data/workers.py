"""How many processes load data."""

from __future__ import annotations

import os
from typing import Literal

from lightning.pytorch.utilities import rank_zero_warn

from dyndet.errors import UserError

MOST = 8
"""More hardly help, and each holds its own copy of the annotations."""


def loader_workers(asked: int | Literal["auto"]) -> int:
    """The number of loader processes: no more than there are cores for this process.

    Args:
        asked: so many, 0 to load in the main process, or "auto": one less than there are cores, at most `MOST`.

    Raises:
        UserError: if it is negative.
    """
    cores = cores_here()
    if asked == "auto":
        return min(cores - 1, MOST)
    if asked < 0:
        raise UserError(f"data.num_workers={asked}: give a number, 0 to load in the main process, or auto")
    if asked > cores:
        rank_zero_warn(
            f"data.num_workers={asked}, but there are {cores} cores: {cores} are used (auto takes what fits)"
        )
    return min(asked, cores)


def cores_here() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
