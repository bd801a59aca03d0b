"""Runs that end before their last step: no more progress, or no more time."""

from __future__ import annotations

import re
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_info

from dyndet.errors import UserError


class EarlyStop(EarlyStopping):
    """Ends a run when so many validations in a row were no better than the best before them (`early_stop=5`).

    The count goes to checkpoints and back, the patience does not: a run that ended so goes on with a larger one.

    Args:
        patience: validations; None never ends a run.
        monitor: the score; more is better.
        min_delta: less than this is no improvement.
    """

    def __init__(self, patience: int | None = None, *, monitor: str = "val/AP", min_delta: float = 0.0) -> None:
        if patience is not None and patience < 1:
            raise ValueError(f"early_stop counts validations, at least 1 or null, got {patience}")
        super().__init__(
            monitor,
            min_delta=min_delta,
            patience=patience or 0,
            mode="max",
            check_finite=False,  # no number is no progress
            check_on_train_epoch_end=False,
        )
        self.enabled = patience is not None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled:
            return
        stopping = trainer.should_stop
        super().on_validation_end(trainer, pl_module)
        if trainer.should_stop and not stopping:
            rank_zero_info(
                f"early_stop={self.patience}: {self.monitor} was not above {float(self.best_score):.4f} in the last "
                f"{self.wait_count} validations"
            )

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() if self.enabled else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict and self.enabled:
            super().load_state_dict(state_dict | {"patience": self.patience})


class TimeLimit(Callback):
    """Ends a run at the first batch after some time (`time_limit=00:30:00`); it is validated and saved there.

    The time is that of one command, from the start of its training, so `ckpt_path=last` goes on for as long again.

    Args:
        limit: hours, minutes and seconds as "01:30:00", with days before them, or as "1h30m", or a number of seconds
            (what YAML makes of 01:30:00); None is no limit.
    """

    def __init__(self, limit: str | int | None = None) -> None:
        self.limit = limit
        self.seconds = None if limit is None else seconds_of(limit)
        self._started = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if self.seconds is None or trainer.should_stop:
            return
        spent = time.monotonic() - self._started >= self.seconds
        if trainer.strategy.reduce_boolean_decision(spent, all=False):  # all processes end, or none
            trainer.should_stop = True
            rank_zero_info(f"time_limit={self.limit} is reached at step {trainer.global_step}: ckpt_path=last goes on")


def seconds_of(limit: str | int) -> int:
    """The seconds of "01:30:00", "1:00:00:00" (days first) or "1h30m".

    Raises:
        UserError: if it is none of them.
    """
    text = f"{limit}s" if isinstance(limit, int) else limit
    clock = re.fullmatch(r"(?:(\d+):)?(\d+):(\d{1,2}):(\d{1,2})", text.strip())
    words = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.replace(" ", ""))
    found = clock or words
    seconds = (
        sum(int(n or 0) * unit for n, unit in zip(found.groups(), (86400, 3600, 60, 1), strict=True)) if found else 0
    )
    if not seconds:
        raise UserError(f"time_limit={limit} is no time: write hours, minutes and seconds, as 00:30:00, or 30m")
    return seconds
