"""Which branches a head has: a predictor says what it reads, and nothing else is built, run or priced."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, get_args

from dyndet.errors import UserError
from dyndet.models.detectors.base import Branch, Head

BRANCHES: tuple[Branch, ...] = get_args(Branch)


def check_branches(branches: Sequence[Branch]) -> tuple[Branch, ...]:
    """The branches in their common order, so that those of one seed start alike however they were written.

    Raises:
        ValueError: on none, and on unknown ones.
    """
    if not branches or not set(branches) <= set(BRANCHES):
        raise ValueError(f"branches must be some of {', '.join(BRANCHES)}, got {list(branches)}")
    return tuple(branch for branch in BRANCHES if branch in branches)


def reads_of(predictor: Callable[..., Any]) -> tuple[Branch, ...]:
    """What a predictor that waits for its width will read: `reads` of its class; everything where it does not say."""
    return getattr(_unwrapped(predictor), "reads", BRANCHES)


def with_branches(head: Callable[..., Head], branches: Sequence[Branch]) -> Callable[..., Head]:
    """A head that waits for its width, told which branches to build; one that is to build all needs no telling.

    Raises:
        UserError: if it cannot leave a branch out.
    """
    if set(branches) == set(BRANCHES):
        return head
    parameters = inspect.signature(head).parameters
    if "branches" not in parameters and all(item.kind is not item.VAR_KEYWORD for item in parameters.values()):
        name = getattr(_unwrapped(head), "__name__", "this head")
        raise UserError(
            f"{name} builds all branches, but this predictor reads only {', '.join(branches)} and the others would "
            "not train: let its constructor take `branches`, as PlainHead does, or choose another head or predictor"
        )
    return functools.partial(head, branches=tuple(branches))


def _unwrapped(part: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(part, functools.partial):
        part = part.func
    return part
