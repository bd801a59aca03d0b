"""The device that a command computes on."""

from __future__ import annotations

import torch

from dyndet.errors import UserError, reason


def device_of(name: str) -> torch.device:
    """The device that `device=NAME` means; "auto" is CUDA where there is one.

    Raises:
        UserError: if there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(str(name))
        torch.zeros(1, device=device).tolist()  # finds out whether it is here
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UserError(f"device={name} is not available: {reason(error)}") from error
    return device
