"""What is shown and written around training: the progress line, a result file, what validation found."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from dyndet.metrics.export import to_coco_json
from dyndet.structures import Batch, Category


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
