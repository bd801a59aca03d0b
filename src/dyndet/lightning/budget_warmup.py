"""Budgets over time."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dyndet.errors import UserError
from dyndet.models.budget import Budget


class BudgetWarmup(Callback):
    """Raises lambda linearly from 0 over the first part of a run.

    A closed gate gets no gradient and is hard to reopen, so a price that acts before the head has learned what is
    worth computing closes gates for good. The published schedule has no warm-up.

    Args:
        fraction: share of all training steps over which lambda rises; 0 switches the warm-up off.
    """

    def __init__(self, fraction: float) -> None:
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
        self.fraction = fraction
        self._weights: dict[Budget, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        budgets = [part for part in pl_module.modules() if isinstance(part, Budget)]  # a dynamic detector has two
        if not budgets:
            raise UserError("callbacks.budget_warmup: this detector has no budget to warm up")
        self._weights = {budget: budget.weight for budget in budgets}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        steps = self.fraction * trainer.estimated_stepping_batches
        for budget, weight in self._weights.items():
            budget.weight = weight * min(1.0, trainer.global_step / steps if steps else 1.0)
