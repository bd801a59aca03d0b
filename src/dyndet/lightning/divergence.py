"""Training that diverges: it ends with a message, and no checkpoint is written of what is left."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dyndet.errors import DivergedError

_ADVICE = "start again, or go on from the last good checkpoint, with a lower optim.optimizer.lr or a longer warm-up"


class DivergenceWatch(Callback):
    """Ends a run whose weights are no longer numbers when they would be saved, or whose loss is not at two looks in a
    row: with mixed precision it overflows now and then, and recovers.

    Args:
        every: batches between looks at the loss, each of which waits for the GPU; 0 never looks, None is Lightning's
            usual interval of its log, 50.
    """

    def __init__(self, every: int | None) -> None:
        self.every = 50 if every is None else every
        self._batches = 0
        self._lost_at: int | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1
        if not self.every or self._batches % self.every:
            return
        finite = bool(torch.isfinite(outputs["loss"]))
        if trainer.strategy.reduce_boolean_decision(finite, all=True):  # all processes end, or none
            self._lost_at = None
        elif self._lost_at is None:
            self._lost_at = trainer.global_step
        else:
            raise DivergedError(f"the loss is no number since step {self._lost_at} at the latest: {_ADVICE}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        finite = torch.stack([parameter.isfinite().all() for parameter in pl_module.parameters()])
        if not bool(finite.all()):
            raise DivergedError(f"the weights are no numbers at step {trainer.global_step}: {_ADVICE}")
