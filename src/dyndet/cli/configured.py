"""Exceptions of other libraries that are about a value of the configuration, not about a mistake of ours."""

from __future__ import annotations

import traceback

from lightning.fabric.utilities.exceptions import MisconfigurationException

_READERS = ("lightning", "torch.optim", "torch.utils.data", "torch.distributed", "hydra")
"""Who checks options that are handed on to them."""


def about_a_value(error: Exception) -> bool:
    """Whether an exception comes from a library that was given what the configuration says, and refuses it."""
    if isinstance(error, MisconfigurationException):
        return True
    if not isinstance(error, ValueError | TypeError):
        return False
    frames = list(traceback.walk_tb(error.__traceback__))
    raised_in = str(frames[-1][0].f_globals.get("__name__", "")) if frames else ""
    return any(f"{raised_in}.".startswith(f"{reader}.") for reader in _READERS)
