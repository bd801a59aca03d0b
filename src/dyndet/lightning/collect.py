"""What a validation found, kept image by image for reports and other tools."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from dyndet.lightning.detection import DetectionModule
from dyndet.lightning.writing import writing
from dyndet.metrics.validation import ImageFacts
from dyndet.ops.distributed import gathered
from dyndet.report.style import to_picture
from dyndet.routing import Routes
from dyndet.structures import Batch, Target


class Collect(Callback):
    """Writes the latest validation to `detections.json`, `ground_truth.json` and `compute.json`, see `ImageFacts`.

    Args:
        folder: of the run; None keeps what was found and writes nothing.
        masks: whether the detections keep theirs, as run lengths: costs a while where there are many.
        pictures: of images without a file, generated ones, so many are kept under `images/` in the folder.

    Attributes:
        facts: of the latest validation, all processes' where it ended; empty once they are written.
        images: how many there were.
        seconds: that its steps took on this process.
    """

    def __init__(self, folder: str | Path | None = None, *, masks: bool = False, pictures: int = 256) -> None:
        self.folder = None if folder is None else Path(folder)
        self.masks = masks
        self.pictures = pictures
        self.facts = ImageFacts()
        self.images = 0
        self.seconds = 0.0
        self._started = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.folder is not None:  # processes that torchrun or srun started have others
            self.folder = trainer.strategy.broadcast(self.folder)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.facts, self.seconds = ImageFacts(), 0.0

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
        if trainer.sanity_checking:
            return
        assert isinstance(pl_module, DetectionModule)
        routing, sizes = outputs["routing"], batch.images.sizes.tolist()
        ways = routing.hard.tolist() if isinstance(routing, Routes) else [None] * len(sizes)
        for index, (found, target, (height, width), hard) in enumerate(
            zip(outputs["detections"], batch.targets, sizes, ways, strict=True)
        ):
            if not target.path and self.folder is not None:
                with writing(trainer, self.folder / "images"):
                    target = self._with_file(target, batch.images.pixels[index, :, :height, :width])
            found = found if self.masks else replace(found, masks=None)
            self.facts.add(found, target, (height, width), pl_module.categories, hard)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DetectionModule)
        if trainer.sanity_checking:
            return
        everyone, self.facts = gathered([self.facts]), ImageFacts()  # every process has seen its own images
        for facts in everyone:
            self.facts += facts
        self.images = len(self.facts.images)
        if self.folder is not None:
            if trainer.is_global_zero:
                with writing(trainer, self.folder):
                    self.facts.write(self.folder, pl_module.categories)
            self.facts = ImageFacts()  # of a large set they fill the memory

    def _with_file(self, target: Target, image: Tensor) -> Target:
        """The target of a picture in the folder, the same in every validation."""
        assert self.folder is not None
        path = self.folder / "images" / f"{target.image_id}.jpg"
        if not path.is_file() and len(self.facts.images) < self.pictures:
            path.parent.mkdir(parents=True, exist_ok=True)
            to_picture(image).save(path, quality=90)
        return replace(target, path=str(path)) if path.is_file() else target
