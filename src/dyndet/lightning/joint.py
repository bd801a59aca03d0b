"""Step 1 of a dynamic detector: both detectors train together, and both are validated."""

from __future__ import annotations

from typing import Any, cast

from lightning.pytorch.utilities.types import STEP_OUTPUT

from dyndet.lightning.detection import DetectionModule
from dyndet.metrics.average_precision import CocoMetric
from dyndet.models.detectors.dynamic import DynamicDetector
from dyndet.structures import Batch


class JointModule(DetectionModule):
    """A dynamic detector without its router: `val/...` is of the second detector, `val/first/...` of the first.

    Args:
        args: see `DetectionModule`.
        kwargs: likewise.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.first_ap = CocoMetric(self.categories, iou_type=self.ap.iou_type, per_class=False)

    def validation_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        if not batch.targets:
            return super().validation_step(batch, batch_idx)
        found, _ = cast(DynamicDetector, self.detector).detect_by(batch.images, "first")
        self.first_ap.update(found, batch.targets, batch.images.sizes)
        return super().validation_step(batch, batch_idx)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.first_ap.reset()

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.log_dict({f"val/first/{name}": value for name, value in self.first_ap.compute().items()})
