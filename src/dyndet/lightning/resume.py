"""Runs that stop and go on: exact random state, and a checkpoint wherever they stop."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dyndet.errors import DivergedError


class ExactResume(Callback):
    """Makes a resumed run continue as if it had never stopped (with the samplers of `DetectionDataModule`).

    Torch's random state is stored in checkpoints and restored at the first training batch after a resume; any earlier
    would not hold, since building data iterators draws from the same generator. And an epoch that Lightning forgets to
    count as begun, when it resumes from the last batch of the epoch before, is counted.
    """

    def __init__(self) -> None:
        self._pending: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pending = state_dict

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        epochs = trainer.fit_loop.epoch_progress
        counts = epochs.state_dict()["current"]
        if counts["ready"] == counts["processed"]:
            epochs.increment_ready()
            epochs.increment_started()
        if self._pending is None:
            return
        torch.set_rng_state(self._pending["cpu"].cpu())
        if "cuda" in self._pending and torch.cuda.is_available():
            torch.cuda.set_rng_state(self._pending["cuda"].cpu())
        self._pending = None


class LastCheckpoint(ModelCheckpoint):
    """Saves interrupted runs as well, but not when one of several processes fails: the others would never join it.

    A run that `max_steps` ends is saved and validated where it stands: Lightning would close its epoch first, so that a
    resumed run skipped the rest.
    """

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_end(trainer, *args, **kwargs)
        if _at_max_steps(trainer):
            where = {"epoch": trainer.current_epoch, "step": trainer.global_step}
            metrics = {**trainer.callback_metrics, **{key: torch.tensor(value) for key, value in where.items()}}
            trainer.save_checkpoint(self.format_checkpoint_name(metrics), weights_only=False)
            trainer.should_stop = True  # validates

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _at_max_steps(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, DivergedError):
            return  # the last good checkpoint stays
        if trainer.world_size == 1 or isinstance(exception, KeyboardInterrupt | SIGTERMException):
            super().on_exception(trainer, pl_module, exception)


def _at_max_steps(trainer: Trainer) -> bool:
    return 0 < trainer.max_steps <= trainer.global_step
