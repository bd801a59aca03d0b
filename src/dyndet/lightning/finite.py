"""A loss that is no longer a number."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dyndet.errors import DivergedError


class FiniteLoss(Callback):
    """Ends a run whose loss is no longer a number at two looks in a row: mixed precision overflows now and then.

    Args:
        every: batches between looks, each of which waits for the GPU.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._batches = 0
        self._lost_at: int | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1
        if self._batches % self.every:
            return
        if bool(torch.isfinite(outputs["loss"])):
            self._lost_at = None
        elif self._lost_at is None:
            self._lost_at = trainer.global_step
        else:
            raise DivergedError(
                f"the loss is {float(outputs['loss'])} since step {self._lost_at} at the latest: lower "
                "optim.optimizer.lr, or lengthen its warm-up"
            )
