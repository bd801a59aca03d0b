"""How long a run will take, said soon after it has begun."""

from __future__ import annotations

import math
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info


class Estimate(Callback):
    """One line after some batches on a CPU: about how long the training steps that remain will take.

    Args:
        after: batches that are timed, after the first one.
        least: seconds below which nothing is said.
    """

    def __init__(self, after: int = 20, least: float = 60.0) -> None:
        self.after = after
        self.least = least
        self._batches = -1  # the first one warms up
        self._started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches = -1

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if self._batches >= self.after or trainer.strategy.root_device.type != "cpu":
            return
        self._batches += 1
        if self._batches == 0:
            self._started = time.perf_counter()
        elif self._batches == self.after:
            each = (time.perf_counter() - self._started) / self.after
            remaining = batches_left(trainer)
            if self.least <= each * remaining < math.inf:
                length = f"{trainer.max_epochs} epochs" if trainer.max_steps == -1 else f"{trainer.max_steps} steps"
                rank_zero_info(
                    f"about {spoken(each * remaining)} of training to go until {length} ({each:.2g} s per batch, "
                    "validation not counted)"
                )


def batches_left(trainer: Trainer) -> float:
    """Training batches that a run still has, of this process."""
    window = trainer.accumulate_grad_batches
    by_steps = (trainer.max_steps - trainer.global_step) * window if trainer.max_steps != -1 else math.inf
    if trainer.max_epochs in (None, -1):
        return by_steps
    done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return min(by_steps, (trainer.max_epochs - trainer.current_epoch) * trainer.num_training_batches - done)


def spoken(seconds: float) -> str:
    """In the largest unit that fits: "50 s", "12 min", "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
