"""Where autocast must not reach."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: str) -> AbstractContextManager[object]:
    """What runs inside keeps the precision of its tensors; "meta" tensors, as used for counting, know no autocast."""
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
