"""Averaged weights."""

from __future__ import annotations

import math

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class EMA(WeightAveraging):
    """Exponential moving average of the weights, with a decay that grows to its value.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), so that a short run does not keep its first weights, or
    with a `ramp` decay * (1 - exp(-n / ramp)) (YOLO). The average is what is validated and what checkpoints hold.
    """

    def __init__(self, decay: float = 0.999, ramp: float | None = None) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay must lie between 0 and 1, got {decay}")

        def average(averaged: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
            count = int(updates)
            rate = min(decay, (1 + count) / (10 + count)) if ramp is None else decay * (1 - math.exp(-count / ramp))
            return torch.lerp(current, averaged, rate) if current.is_floating_point() else current

        super().__init__(avg_fn=average)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The module is still on the CPU here; its average goes where it will go."""
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)
