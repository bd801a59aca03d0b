"""Pictures of the first validation images: ground truth, detections and where compute went."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image

from dyndet.lightning.detection import DetectionModule
from dyndet.lightning.writing import writing
from dyndet.report.draw import DRAWN_FROM
from dyndet.report.gate_maps import preview
from dyndet.structures import Batch


class Preview(Callback):
    """One picture per validation epoch under `folder`, and in the loggers that take images.

    Args:
        folder: where `step_000064.png` and so on go.
        images: how many validation images to show.
        score_threshold: detections below it are not drawn.
    """

    def __init__(self, folder: str | Path, *, images: int = 4, score_threshold: float = DRAWN_FROM) -> None:
        self.folder = Path(folder)
        self.images = images
        self.score_threshold = score_threshold
        self._strips: list[Image.Image] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._strips = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or len(self._strips) >= self.images:
            return
        assert isinstance(pl_module, DetectionModule)
        detections, routing = outputs["detections"], outputs["routing"]
        names = [category.name for category in pl_module.categories]
        for index in range(min(len(batch.targets), self.images - len(self._strips))):
            height, width = batch.images.sizes[index].tolist()
            strip = preview(
                batch.images.pixels[index, :, :height, :width].cpu(),
                batch.targets[index].to("cpu"),
                detections[index].to("cpu"),
                routing,
                index=index,
                names=names,
                strides=pl_module.detector.strides,
                score_threshold=self.score_threshold,
            )
            self._strips.append(strip)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._strips:
            return
        width = max(strip.width for strip in self._strips)
        sheet = Image.new("RGB", (width, sum(strip.height for strip in self._strips)), "white")
        top = 0
        for strip in self._strips:
            sheet.paste(strip, (0, top))
            top += strip.height
        self._strips = []
        with writing(trainer, self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            sheet.save(self.folder / f"step_{trainer.global_step:06d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("preview", [sheet], step=trainer.global_step)
            elif isinstance(logger, TensorBoardLogger):
                image = np.asarray(sheet)
                logger.experiment.add_image("preview", image, trainer.global_step, dataformats="HWC")
