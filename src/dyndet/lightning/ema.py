"""Averaged weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class EMA(WeightAveraging):
    """Exponential moving average of the weights, with a decay that grows to its value.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), so that a short run does not keep its first weights, or
    with a `ramp` decay * (1 - exp(-n / ramp)) (YOLO). The average is what is validated and what checkpoints hold.
    """

    def __init__(self, decay: float = 0.999, ramp: float | None = None) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay must lie between 0 and 1, got {decay}")
        super().__init__()
        self.decay = decay
        self.ramp = ramp
        self._exchanged = False  # the average is in the module

    def decay_after(self, updates: int) -> float:
        """The share of the old average in the next one."""
        if self.ramp is None:
            return min(self.decay, (1 + updates) / (10 + updates))
        return self.decay * (1 - math.exp(-updates / self.ramp))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The module is still on the CPU here; its average goes where it will go."""
        if stage == "fit":
            self._average_model = HostCountedAverage(pl_module, trainer.strategy.root_device, self.decay_after)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Amid a validation: what is saved next is the module and its average, each in its place."""
        if self._exchanged:
            self._swap_models(pl_module)

    def _swap_models(self, pl_module: LightningModule) -> None:
        super()._swap_models(pl_module)
        self._exchanged = not self._exchanged


class HostCountedAverage(AveragedModel):
    """Torch's averaged model with updates that never wait for the device.

    The updates are counted on the host; `n_averaged`, on the CPU, takes the count to checkpoints and back. The first
    update copies. Later ones average floating-point weights and buffers, all of a type at once, and copy the others.

    Args:
        model: what is averaged; the average starts as a copy of it.
        device: where the average lies.
        decay: from the number of updates so far to the share of the old average.
    """

    def __init__(self, model: nn.Module, device: torch.device, decay: Callable[[int], float]) -> None:
        super().__init__(model, device, use_buffers=True)
        self.n_averaged = torch.tensor(0)
        self.decay = decay
        self.updates = 0
        self.register_load_state_dict_post_hook(_restore_count)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """One more update."""
        groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        ours = chain(self.module.parameters(), self.module.buffers())
        for average, current in zip(ours, chain(model.parameters(), model.buffers()), strict=True):
            averages, currents = groups.setdefault((average.device, average.dtype), ([], []))
            averages.append(average)
            currents.append(current.to(average.device, average.dtype))
        for (_, dtype), (averages, currents) in groups.items():
            if self.updates and dtype.is_floating_point:
                torch._foreach_lerp_(averages, currents, 1 - self.decay(self.updates))  # pyright: ignore[reportPrivateImportUsage]
            else:
                torch._foreach_copy_(averages, currents)  # pyright: ignore[reportPrivateImportUsage]
        self.updates += 1
        self.n_averaged.fill_(self.updates)


def _restore_count(module: Any, _: Any) -> None:
    module.updates = int(module.n_averaged)
