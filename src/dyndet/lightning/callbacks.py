"""What happens around training: exact random state on resume, a result file, the progress line."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dyndet.errors import UserError
from dyndet.metrics.export import to_coco_json
from dyndet.structures import Batch, Category


class DivergedError(UserError):
    """Training that cannot recover."""


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
            trainer.save_checkpoint(self.format_checkpoint_name({}), weights_only=False)
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


class FiniteLoss(Callback):
    """Ends a run whose loss is no longer a number, looking as often as losses are logged.

    Twice in a row: mixed precision overflows now and then, and recovers.
    """

    def __init__(self) -> None:
        self._lost_at: int | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.log_every_n_steps:
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


class ResultFile(Callback):
    """Writes the latest validation numbers to `result.json` in the run's folder, for reports."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "result.json"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        numbers = {key: float(value) for key, value in trainer.callback_metrics.items()}
        result = {key: value for key, value in numbers.items() if math.isfinite(value)}
        result |= {"step": trainer.global_step, "epoch": trainer.current_epoch}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(result, indent=1) + "\n")


class Progress(RichProgressBar):
    """Rich progress bar with the last AP and the share of the head that ran."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        for name, key in (("AP", "val/AP"), ("head", "macs/head_ratio")):
            if key in trainer.callback_metrics:
                items[name] = float(trainer.callback_metrics[key])
        return items


class Collect(Callback):
    """Keeps what a validation found as COCO results, and the seconds that the steps took.

    Args:
        categories: label k is `categories[k]`.

    Attributes:
        results: see `to_coco_json`; masks are run lengths, as the pixels of a whole set would fill the memory.
        images: how many there were.
        seconds: of the steps of this process.
    """

    def __init__(self, categories: Sequence[Category]) -> None:
        self.categories = categories
        self.results: list[dict[str, Any]] = []
        self.images = 0
        self.seconds = 0.0
        self._started = 0.0

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._started = time.perf_counter()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.seconds += time.perf_counter() - self._started
        self.results += to_coco_json(outputs["detections"], batch.targets, self.categories)
        self.images += len(batch.targets)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:  # every process has seen its own images
            parts: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(parts, (self.results, self.images))
            self.results = [item for results, _ in parts for item in results]
            self.images = sum(images for _, images in parts)
