"""Runs that stop and go on: exact random state, and a checkpoint wherever they stop."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dyndet.errors import DivergedError


class ExactResume(Callback):
    """Makes a resumed run continue as if it had never stopped (with the samplers of `DetectionDataModule`).

    Torch's random state is stored in checkpoints and restored at the first training batch after a resume; any earlier
    would not hold, since building data iterators draws from the same generator. And an epoch that Lightning forgets to
    count as begun, when it resumes from the last batch of the epoch before, is counted.

    Of several processes each gets its own state back. Those without a saved one are seeded with a number drawn from the
    first saved state, plus their rank: where a run goes on with more processes, where an interrupt ended it (processes
    that may have stopped elsewhere are not waited for, so that the checkpoint holds its writer's state alone), and with
    checkpoints from before states of all processes were kept.
    """

    def __init__(self) -> None:
        self._pending: list[dict[str, Any]] | None = None

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lightning dumps checkpoints on every process."""
        if trainer.world_size == 1 or trainer.interrupted:
            return
        states: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(states, self.state_dict())
        checkpoint["callbacks"][self.state_key] = {"processes": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pending = state_dict.get("processes", [state_dict])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        epochs = trainer.fit_loop.epoch_progress
        counts = epochs.state_dict()["current"]
        if counts["ready"] == counts["processed"]:
            epochs.increment_ready()
            epochs.increment_started()
        if self._pending is not None:
            _restore(self._pending, trainer.global_rank)
            self._pending = None


def _restore(states: list[dict[str, Any]], rank: int) -> None:
    if rank >= len(states):
        first = torch.Generator().set_state(states[0]["cpu"].cpu())
        torch.manual_seed(int(torch.randint(2**62, (), generator=first)) + rank)
        return
    torch.set_rng_state(states[rank]["cpu"].cpu())
    if "cuda" in states[rank] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[rank]["cuda"].cpu())


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
