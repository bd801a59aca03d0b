"""Prices that rise from nothing."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from dyndet.errors import UserError
from dyndet.lightning.budget_warmup import BudgetWarmup
from dyndet.models.budget import Budget


def module(*weights: float) -> LightningModule:
    whole = LightningModule()
    whole.detector = torch.nn.ModuleList([Budget(weight=weight) for weight in weights])
    return whole


def test_both_budgets_of_a_cascade_rise() -> None:
    whole, callback = module(0.4, 0.1), BudgetWarmup(0.5)
    trainer: Any = SimpleNamespace(estimated_stepping_batches=20, global_step=0)
    callback.on_fit_start(trainer, whole)
    for step, share in ((0, 0.0), (5, 0.5), (10, 1.0), (19, 1.0)):
        trainer.global_step = step
        callback.on_train_batch_start(trainer, whole, None, step)
        assert [part.weight for part in whole.detector] == pytest.approx([0.4 * share, 0.1 * share])


def test_nothing_to_warm_up_is_said() -> None:
    trainer: Any = SimpleNamespace()
    with pytest.raises(UserError, match="no budget"):
        BudgetWarmup(0.5).on_fit_start(trainer, module())
