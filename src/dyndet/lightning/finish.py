"""The end of a run: what it leaves behind is of its final weights, and every logger is closed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.loggers import Logger, WandbLogger

from dyndet.cli.latest import LAST, step_of
from dyndet.errors import WriteError
from dyndet.lightning.best import BestCheckpoint
from dyndet.lightning.detection import DetectionModule
from dyndet.lightning.writing import lost


def finish(trainer: Trainer, module: DetectionModule, data: LightningDataModule, folder: Path) -> None:
    """Makes the last checkpoint and the last validation those of the final weights, whatever the intervals were; if
    that validation is the best, so is its checkpoint.

    Args:
        trainer: after `fit`.
        module: that was trained.
        data: to validate on.
        folder: of the run.
    """
    last = folder / "checkpoints" / LAST
    # The main process decides for all: saving waits for everyone.
    if trainer.strategy.broadcast(step_of(last)) != trainer.global_step:
        trainer.save_checkpoint(last, weights_only=False)
        if lost(trainer, last):
            raise WriteError(f"{last} does not hold the final weights, which the disk did not take: see above")
    if module.validated_step != trainer.global_step:
        trainer.validate(module, data, verbose=False)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, BestCheckpoint):
                callback.renew(trainer, last)


@contextmanager
def closing(loggers: Sequence[Logger]) -> Iterator[None]:
    """Ends every logger's run with its outcome, so that the jobs of a multirun stay apart."""
    outcome = "failed"
    try:
        yield
        outcome = "success"
    finally:
        for logger in loggers:
            logger.finalize(outcome)
            if isinstance(logger, WandbLogger):
                logger.experiment.finish(exit_code=int(outcome == "failed"))
