"""COCO average precision in the pixels and with the numbers of the original annotations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from dyndet.errors import UserError
from dyndet.metrics.export import to_xywh, truth_masks, truth_of
from dyndet.structures import Category, Detections, Size, Target

KEYS = {
    "AP": "map",
    "AP50": "map_50",
    "AP75": "map_75",
    "APs": "map_small",
    "APm": "map_medium",
    "APl": "map_large",
    "AR100": "mar_100",
}
"""Our names of torchmetrics' results."""

SMALLEST_AREA = 1e-9


class CocoMetric(MeanAveragePrecision):
    """COCO AP over at most 100 detections per image and class; equal to pycocotools on the annotated json.

    Ground truth is taken as annotated (`Target.truth`): boxes that leave the image or have no area count as they are,
    although training clips or drops them.

    Values lie in 0..1; what has no ground truth to be found is nan (COCO prints -1). Everything is kept on the CPU, and
    under DDP the processes may have seen different numbers of images.

    Small, medium and large follow the annotated area where the target has one, else that of the box (official COCO
    counts mask pixels, so its APs, APm and APl differ from those of boxes alone; AP, AP50 and AP75 do not). For masks
    the areas are those of masks, of detections as well.

    Args:
        categories: label k is `categories[k]`.
        iou_type: "bbox", or ("bbox", "segm") for masks as well; keys of masks begin with "segm/".
        per_class: also report `AP/<name>` of every category.
    """

    full_state_update = False
    image_ids: list[Tensor]

    def __init__(
        self,
        categories: Sequence[Category],
        *,
        iou_type: Literal["bbox"] | Sequence[Literal["bbox", "segm"]] = "bbox",
        per_class: bool = True,
    ) -> None:
        kinds: tuple[Literal["bbox", "segm"], ...] = ("bbox",) if iou_type == "bbox" else tuple(iou_type)  # type: ignore[arg-type]
        if set(kinds) not in ({"bbox"}, {"bbox", "segm"}):
            # Masks alone would drop images without ground truth, and with them their false positives.
            raise UserError(f'iou_type must be "bbox" or ("bbox", "segm"), got {iou_type!r}')
        backend = "faster_coco_eval" if find_spec("faster_coco_eval") else "pycocotools"
        super().__init__(
            box_format="xywh",
            iou_type=kinds,
            # COCO's own, in float64: torchmetrics' float32 defaults miss recalls of exactly k / 100.
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0.0, 1.0, 101).tolist(),
            class_metrics=per_class,
            backend=backend,
        )
        self.warn_on_many_detections = False
        self.categories = list(categories)
        self.add_state("image_ids", default=[], dist_reduce_fx=None)

    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, detections: Sequence[Detections], targets: Sequence[Target], sizes: Tensor | None = None
    ) -> None:
        """Adds a batch.

        Args:
            detections: one per image, in pixels of the image on disk.
            targets: one per image, in pixels of the resized image.
            sizes: (B, 2) H, W of the resized images without padding (`ImageBatch.sizes`); None if the targets are in
                pixels of the images on disk.

        Raises:
            UserError: if masks are to be evaluated and there are none.
        """
        shapes = [target.original_size for target in targets] if sizes is None else sizes.tolist()
        predicted = [self._detected(item) for item in detections]
        annotated = [self._annotated(item, (size[0], size[1])) for item, size in zip(targets, shapes, strict=True)]
        super().update(predicted, annotated)
        self.image_ids.extend(torch.tensor(target.image_id) for target in targets)

    def compute(self) -> dict[str, float]:
        """AP, AP50, AP75, APs, APm, APl, AR100 and `AP/<name>`, each in 0..1 or nan."""
        self._sort_by_image()
        found: dict[str, Tensor] = super().compute()
        values: dict[str, float] = {}
        for kind in self.iou_type:
            theirs = "" if len(self.iou_type) == 1 else f"{kind}_"
            ours = "segm/" if kind == "segm" else ""
            values |= {ours + key: _value(found[theirs + name]) for key, name in KEYS.items()}
            if self.class_metrics:
                per_class = found.get(f"{theirs}map_per_class", torch.zeros(0))
                known = dict(zip(found["classes"].reshape(-1).tolist(), per_class.reshape(-1), strict=False))
                for label, category in enumerate(self.categories):
                    values[f"{ours}AP/{category.name}"] = _value(known.get(label, torch.tensor(-1.0)))
        return values

    def _detected(self, item: Detections) -> dict[str, Tensor]:
        values = {"boxes": to_xywh(item.boxes), "scores": item.scores.detach().cpu(), "labels": item.labels.cpu()}
        if "segm" in self.iou_type:
            if item.masks is None and len(item):
                raise UserError("masks are to be evaluated, but this detector finds boxes only: use iou_type=bbox")
            masks = torch.zeros(0, 1, 1) if item.masks is None else item.masks
            values["masks"] = masks.detach().cpu().bool().view(torch.uint8)
        return values

    def _annotated(self, item: Target, size: Size) -> dict[str, Tensor]:
        truth = truth_of(item, size)
        values = {
            "boxes": torch.from_numpy(truth.boxes),
            "labels": torch.from_numpy(truth.labels),
            "iscrowd": torch.from_numpy(truth.crowd).int(),
        }
        area = truth.area
        if "segm" in self.iou_type:
            values["masks"] = truth_masks(item, size).to(torch.uint8)
        elif area is None:
            area = np.abs(truth.boxes[:, 2:].prod(1))
        if area is not None:
            # torchmetrics takes an area of 0 for one that is missing.
            values["area"] = torch.from_numpy(area.astype(np.float64)).clamp(min=SMALLEST_AREA)
        return values

    def _sort_by_image(self) -> None:
        # Equal scores are ranked in the order of the images; pycocotools sorts those by id.
        order = sorted(range(len(self.image_ids)), key=lambda index: int(self.image_ids[index]))
        for name in self._reductions:
            state = getattr(self, name)
            if state:
                setattr(self, name, [state[index] for index in order])

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        # One exchange of objects: gathering tensor by tensor hangs when processes saw different numbers of images, and
        # NCCL cannot gather tensors on the CPU.
        group = process_group or self.process_group
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, {name: getattr(self, name) for name in self._reductions}, group=group)
        for name in self._reductions:
            setattr(self, name, [item for part in parts for item in part[name]])


def _value(value: Tensor) -> float:
    number = float(value)
    return math.nan if number < 0 else number
