"""The collectives that losses and validation need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
_ALONE = ContextVar("_ALONE", default=False)


def reduce_mean(value: Tensor) -> Tensor:
    """Mean of a scalar over all processes; the value itself in a single process."""
    if not _several():
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def broadcast_buffers(module: nn.Module) -> None:
    """Gives every process the buffers of the first: batch-norm statistics drift apart between synchronisations."""
    if _several():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if _several() else 1


def gathered(items: list[T]) -> list[T]:
    """The items of all processes, those of the first in front."""
    if not _several():
        return items
    everyone: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, items)
    return [item for some in everyone for item in some]


@contextmanager
def alone() -> Iterator[None]:
    """Inside it a process is on its own: no collective is called, whatever the others do."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def _several() -> bool:
    return not _ALONE.get() and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
