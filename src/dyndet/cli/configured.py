"""Values of a configuration that other libraries refuse, or would take and choke on: named by their keys."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable

from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from dyndet.cli.out_of_memory import ran_out, said
from dyndet.errors import UserError

_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "trainer.max_epochs": ("at least 1, or -1 for no limit", lambda value: value >= 1 or value == -1),
    "trainer.max_steps": ("at least 1, or -1 for no limit", lambda value: value >= 1 or value == -1),
    "trainer.accumulate_grad_batches": ("at least 1", lambda value: value >= 1),
    "trainer.log_every_n_steps": ("at least 0", lambda value: value >= 0),
    "trainer.check_val_every_n_epoch": ("at least 1, or null", lambda value: value >= 1),
    "trainer.val_check_interval": ("a share of an epoch or a number of steps, above 0", lambda value: value > 0),
    "trainer.num_nodes": ("at least 1", lambda value: value >= 1),
    "data.num_workers": ("at least 0", lambda value: value >= 0),
    "optim.optimizer.lr": ("at least 0", lambda value: value >= 0),
    "optim.optimizer.weight_decay": ("at least 0", lambda value: value >= 0),
    "seed": ("between 0 and 4294967295", lambda value: 0 <= value <= 4294967295),
}

_FLAGS = ("again", "channels_last", "compile", "fuse", "gates")

_LIBRARIES = ("lightning", "torch.optim", "torch.utils.data", "torch.distributed", "hydra")
"""Who checks options that are handed on to them."""

_KNOWN = {
    "Expected more than 1 value per channel when training": (
        "a batch has a single position in the deepest map, which its norms cannot average over: larger images or a "
        "larger data.batch_size"
    ),
}


def check_ranges(config: DictConfig) -> None:
    """Whether numbers lie where they mean something, and flags are flags; parts check their own types.

    Raises:
        UserError: naming the key.
    """
    for key in _FLAGS:
        if not isinstance(config.get(key, False), bool):
            raise UserError(f"{key} must be true or false, got {config[key]!r}")
    if not isinstance(config.get("seed", 0), int):
        raise UserError(f"seed must be a whole number, got {config.seed!r}")
    for key, (wanted, holds) in _RANGES.items():
        value = OmegaConf.select(config, key, throw_on_missing=False)
        if isinstance(value, int | float) and not holds(value):
            raise UserError(f"{key} must be {wanted}, got {value}")


def count_of(config: DictConfig, key: str, least: int = 1) -> int | None:
    """A number of things, or None for all; "200" is one, too, as which a number beside a folder of its name is read.

    Raises:
        UserError: if it is something else.
    """
    value = config[key]
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if number is not None and (type(number) is not int or number < least):
        raise UserError(f"{key}={value}: give a whole number from {least}, or null for all")
    return number


def about_a_value(error: Exception) -> str | None:
    """What an exception says of a configured value; None where it is about something else."""
    text = str(error)
    for known, advice in _KNOWN.items():
        if known in text:
            return f"{text.splitlines()[0]}: {advice}"
    if ran_out(error):
        return f"out of memory ({said(error)}): smaller batches or images need less, and so do fewer data.num_workers"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MisconfigurationException):
        return text
    frames = list(traceback.walk_tb(error.__traceback__))
    raised_in = str(frames[-1][0].f_globals.get("__name__", "")) if frames else ""
    ours = isinstance(error, ValueError | TypeError) and re.match(rf"(?:{'|'.join(_LIBRARIES)})(?:\.|$)", raised_in)
    return text if ours else None
