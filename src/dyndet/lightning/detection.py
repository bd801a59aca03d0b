"""The Lightning side of a detector: steps, metrics, optimizer. No modelling here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dyndet.lightning.going_on import align_data, continue_optimizer, forget_scores, parameter_names
from dyndet.lightning.optim import warmup
from dyndet.lightning.own_files import keep_own_files
from dyndet.metrics.average_precision import CocoMetric
from dyndet.metrics.compute import ComputeMeter
from dyndet.metrics.static import StaticCosts, meter_batch
from dyndet.models.detectors.base import Detector
from dyndet.ops.distributed import broadcast_buffers
from dyndet.structures import Batch, Category


class DetectionModule(LightningModule):
    """Trains and validates any detector.

    Validation logs `val/AP`, `val/AP50`, ... (of masks `val/segm/AP`, ...) and the executed multiply-adds (`macs/...`,
    `gates/...`).

    Args:
        detector: the model.
        categories: of the data, stored in every checkpoint so that original class ids come back out.
        optimizer: called with the detector.
        schedule: called with the optimizer and `total_steps`; None keeps the rate constant.
        config: the composed experiment as plain containers, stored in every checkpoint.
    """

    def __init__(
        self,
        detector: Detector,
        *,
        categories: Sequence[Category],
        optimizer: Callable[..., Optimizer] | None = None,
        schedule: Callable[..., LRScheduler] | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.detector = detector
        self.categories = list(categories)
        self.build_optimizer = optimizer
        self.build_schedule = schedule
        self.config = config
        self.ap = CocoMetric(self.categories, iou_type=("bbox", "segm") if detector.has_masks else "bbox")
        self.compute = ComputeMeter(strides=detector.strides)
        self.static = StaticCosts(detector)
        self.validated_step = -1  # global step of the weights that were validated last
        self._resumed: dict[str, Any] | None = None

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        """Callbacks get the `terms` of the loss."""
        losses = self.detector.losses(batch.images, batch.targets)
        size = len(batch.targets)
        self.log("train/loss", losses.total.detach(), prog_bar=True, batch_size=size)
        self.log_dict({f"train/{name}": value.detach() for name, value in losses.terms.items()}, batch_size=size)
        if losses.routing is not None:
            ratio = losses.routing.used_ratio().mean().float()
            self.log("train/head_ratio", ratio, prog_bar=True, batch_size=size)
        return {"loss": losses.total, "terms": {name: value.detach() for name, value in losses.terms.items()}}

    def validation_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        """Updates the metrics; callbacks get the `detections` and the `routing` of the batch, which may be empty."""
        if not batch.targets:
            return {"detections": [], "routing": None}
        detections, routing = self.detector.detect_with_routing(batch.images)
        sizes = batch.images.sizes.tolist()
        macs = meter_batch(self.compute, self.static, routing, sizes)
        detections = [replace(found, macs=spent) for found, spent in zip(detections, macs, strict=True)]
        self.ap.update(detections, batch.targets, batch.images.sizes)
        return {"detections": detections, "routing": routing}

    def on_validation_epoch_start(self) -> None:
        broadcast_buffers(self.detector)  # so that all processes measure the weights that a checkpoint would hold
        self.ap.reset()
        self.compute.reset()

    def on_validation_epoch_end(self) -> None:
        self.validated_step = self.trainer.global_step
        # Both have gathered over all processes, so every process logs the same numbers.
        scores = {f"val/{name}": value for name, value in self.ap.compute().items()}
        quarantine = getattr(getattr(self.trainer, "datamodule", None), "quarantine", None)
        if quarantine is not None and quarantine.skips:
            scores["data/skipped"] = float(len(quarantine.faults))  # files so far, of this process
        self.log_dict(scores | self.compute.compute().as_scalars())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        categories = [{"id": category.id, "name": category.name} for category in self.categories]
        checkpoint["dyndet"] = {"config": self.config, "categories": categories}
        if self.trainer.optimizers:
            checkpoint["dyndet"]["optimised"] = parameter_names(self, self.trainer.optimizers[0])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning goes on to load what is changed in `checkpoint`, here and in `configure_optimizers`."""
        trainer: Any = self._trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        self._resumed = checkpoint
        averaging = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)
        if "current_model_state" in checkpoint and not averaging:  # the average is given up, not what was trained
            checkpoint["state_dict"] = checkpoint["current_model_state"]
        keep_own_files(checkpoint, trainer)
        align_data(checkpoint, trainer)
        forget_scores(checkpoint, self)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        if self.build_optimizer is None:
            raise ValueError("this module was built without an optimizer: it can only validate")
        optimizer: Any = self.build_optimizer(self.detector)
        optimizer._step_supports_amp_scaling = False  # or Lightning clips no gradients of fused ones in mixed precision
        total_steps, scheduler = math.inf, None
        if self.build_schedule is not None:
            total_steps = self.trainer.estimated_stepping_batches
            if math.isinf(total_steps):  # how long it lasts, a clock or a callback decides
                rank_zero_warn("a run without trainer.max_epochs or trainer.max_steps has no schedule: its learning "
                               "rate stays the same after 100 steps of warm-up")  # fmt: skip
                scheduler = warmup(optimizer, steps=100)
            else:
                total_steps = int(total_steps)
                scheduler = self.build_schedule(optimizer, total_steps=total_steps)
        if self._resumed is not None:
            continue_optimizer(self._resumed, self, optimizer, scheduler, total_steps)
            self._resumed = None
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
