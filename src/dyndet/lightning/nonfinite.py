"""Values that are no numbers (NaN, infinite): whether there are any, and which come first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


def any_lost(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Whether any value is no number, () bool on `device`, without waiting for it.

    Args:
        tensors: floating-point, on `device`.
        device: of the answer.
    """
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            groups.setdefault(tensor.dtype, []).append(tensor)
    lost = [
        ~torch.isfinite(torch.stack(torch._foreach_norm(group, float("inf")))).all()  # pyright: ignore[reportPrivateImportUsage]
        for group in groups.values()
    ]
    return torch.stack(lost).any() if lost else torch.zeros((), dtype=torch.bool, device=device)


def first_lost(named: Iterable[tuple[str, Tensor | None]]) -> str | None:
    """The first name whose tensor holds a value that is no number."""
    for name, tensor in named:
        if tensor is not None and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            return name
    return None


def saved_values(trainer: Trainer, module: LightningModule) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds of a run: weights and buffers, their averages, the state of optimizers; by name."""
    yield from ((name, value) for name, value in module.state_dict().items() if isinstance(value, Tensor))
    callbacks: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        average = getattr(callback, "_average_model", None) if isinstance(callback, WeightAveraging) else None
        if average is not None:
            yield from ((f"the average of {name}", value) for name, value in average.module.state_dict().items())
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for optimizer in trainer.optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    yield f"the optimizer's {key} of {names.get(id(parameter), 'a parameter')}", value
