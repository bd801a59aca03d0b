"""Trainers that run out of memory: what they were at, and smaller batches to go on with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

from dyndet.cli.out_of_memory import Work, explained
from dyndet.errors import MemoryShortageError, UserError
from dyndet.lightning.interruption import near


class Sizes(Callback):
    """Notes what the trainer is at, and the sizes of its images.

    Args:
        doing: "training", or "evaluation" of a trainer that only validates.

    Attributes:
        work: for the line that says so.
    """

    def __init__(self, doing: str = "training") -> None:
        self.work = Work(doing)
        self._validating = "validation" if doing == "training" else doing

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.work.doing = f"training, step {trainer.global_step},"
        self.work.see(batch)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.work.doing = self._validating
        self.work.see(batch)


@contextmanager
def memory_explained(config: DictConfig, sizes: Sizes, folder: Path) -> Iterator[None]:
    """Says in one line where a training run has run out of memory.

    Args:
        config: of the run.
        sizes: among its callbacks.
        folder: of the run.
    """

    def advice() -> str:
        last = folder / "checkpoints" / "last.ckpt"
        kept = f". {near(last)} is whole: ckpt_path=last goes on from it" if last.is_file() else ""
        if sizes.work.doing == "validation":
            less = len(sizes.work.sizes) // 2
            return f"set {f'data.val_batch_size={less}, or ' if less else ''}a smaller data.size{kept}"
        if sizes.work.other:
            return f"set a smaller router.batch_size{kept}"
        if not _has_batch_size(config):
            return f"make smaller batches, or of smaller images{kept}"
        batch, window = smaller(config)
        if batch == config.data.batch_size:
            return f"set a smaller data.size, or trainer.precision=bf16-mixed{kept}"
        return (
            f"set data.batch_size={batch} trainer.accumulate_grad_batches={window}, which makes the same steps, or do "
            f"that by on_oom=halve; a smaller data.size; trainer.precision=bf16-mixed{kept}"
        )

    with explained(sizes.work, advice):
        yield


def smaller(config: DictConfig) -> tuple[int, int]:
    """Half the batch, and twice as many of them in a step, or as many as keep its images where the half is rounded."""
    batch, window = int(config.data.batch_size), int(config.trainer.accumulate_grad_batches)
    less = max(batch // 2, 1)
    return less, max(round(batch * window / less), 1)


def halve(config: DictConfig, shortage: MemoryShortageError) -> str:
    """Makes a run that ran out of memory one of smaller batches, which goes on from its last checkpoint.

    Args:
        config: of the run, changed in place.
        shortage: how it ended.

    Returns:
        A line that says so; empty where it is not asked for, or cannot be: batches of one image, several processes,
        which would not all know of it, or memory that is short of something else.
    """
    check_on_oom(config)
    alone = config.trainer.devices in (1, "1", [0]) and config.trainer.num_nodes == 1
    if config.on_oom != "halve" or not alone:
        return ""
    before = str(shortage).partition(" (")[0]
    if shortage.doing == "validation":
        now = shortage.images
        if now < 2 or "val_batch_size" not in config.data:
            return ""
        config.data.val_batch_size = now // 2
        changed = f"data.val_batch_size={now // 2}"
    elif _has_batch_size(config) and config.data.batch_size > 1 and shortage.images:
        if config.data.get("val_batch_size", 0) is None:  # validation stays as it is
            config.data.val_batch_size = config.data.batch_size
        config.data.batch_size, config.trainer.accumulate_grad_batches = smaller(config)
        changed = (
            f"data.batch_size={config.data.batch_size} "
            f"trainer.accumulate_grad_batches={config.trainer.accumulate_grad_batches}"
        )
    else:
        return ""
    last = Path(config.output_dir) / "checkpoints" / "last.ckpt"
    if last.is_file():
        config.ckpt_path = str(last)
    where = f"from {near(last)}" if last.is_file() else "from the start"
    return f"on_oom=halve: {before}: goes on {where} with {changed}"


def _has_batch_size(config: DictConfig) -> bool:
    return isinstance(config.data.get("batch_size"), int)


def check_on_oom(config: DictConfig) -> None:
    """Whether `on_oom` is one of its words.

    Raises:
        UserError: if it is not.
    """
    if OmegaConf.select(config, "on_oom") not in ("stop", "halve"):
        raise UserError(f"on_oom={config.on_oom}: choose stop or halve")
