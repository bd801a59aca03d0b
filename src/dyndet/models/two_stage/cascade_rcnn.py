"""Box heads in a row, each refining the boxes of the one before (Cascade R-CNN).

Source: Cai and Vasconcelos, CVPR 2018, arXiv:1712.00726.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import clip_boxes_to_image

from dyndet.models.predictors.maps import check_labels
from dyndet.models.two_stage.roi import (
    BoxHead,
    PyramidRoIAlign,
    RoISamples,
    as_torchvision,
    box_losses,
    box_outputs,
    box_stage,
    select_detections,
)
from dyndet.structures import Detections, Size, Target


class CascadeRCNN(nn.Module):
    """Stages of growing quality; deltas are shared by all classes.

    The first stage samples its regions, the later ones train on all boxes that the stage before made of them
    (detectron2; mmdetection samples again). Scores are the mean over the stages, boxes those of the last.

    Args:
        channels: C of the features.
        strides: per level.
        num_classes: K.
        head: called for each stage, see `FastRCNN`.
        ious: per stage, the overlap from which a region belongs to a box.
        stds: per stage, standard deviations of the deltas x, y, w, h, which are divided by them.
        loss_weights: per stage.
        size: S, pooled positions per axis.
        max_stride: coarser levels are not read.
        samples: regions per image that train.
        positive_fraction: at most this share of the first stage's is positive.
        beta: where smooth L1 turns from quadratic to linear; 0 is L1.
        score_threshold: detections must exceed it.
        nms_iou: boxes of one class that overlap a better one by more are dropped.
        max_detections: per image.

    Raises:
        ValueError: if `ious`, `stds` and `loss_weights` differ in length.
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        *,
        num_classes: int,
        head: Callable[..., nn.Module] = BoxHead,
        ious: Sequence[float] = (0.5, 0.6, 0.7),
        stds: Sequence[Sequence[float]] = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067)),
        loss_weights: Sequence[float] = (1.0, 0.5, 0.25),
        size: int = 7,
        max_stride: int = 32,
        samples: int = 512,
        positive_fraction: float = 0.25,
        beta: float = 0.0,
        score_threshold: float = 0.05,
        nms_iou: float = 0.5,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        if not len(ious) == len(stds) == len(loss_weights):
            raise ValueError(
                f"ious, stds and loss_weights must be one per stage, got {len(ious)}, {len(stds)}, {len(loss_weights)}"
            )
        self.stages = nn.ModuleList(
            box_stage(
                head(channels=channels, size=size, num_classes=num_classes, class_agnostic=True),
                PyramidRoIAlign(strides, size=size, max_stride=max_stride),
                iou=iou,
                weights=[1 / value for value in std],
                samples=samples,
                positive_fraction=positive_fraction,
                score_threshold=score_threshold,
                nms_iou=nms_iou,
                max_detections=max_detections,
            )
            for iou, std in zip(ious, stds, strict=True)
        )
        self.loss_weights = list(loss_weights)
        self.size = size
        self.num_classes = num_classes
        self.max_detections = max_detections
        self.beta = beta

    def forward(self, regions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(R, C, S, S) pooled features -> logits and deltas of every stage; the part that costs multiply-adds."""
        return [stage.box_head(regions) for stage in self._stages()]

    @torch.no_grad()
    def sample(self, proposals: Sequence[Tensor], targets: Sequence[Target]) -> RoISamples:
        """As `FastRCNN.sample`, for the first stage."""
        check_labels(targets, self.num_classes)
        return RoISamples(*self._stages()[0].select_training_samples(list(proposals), as_torchvision(targets)))

    def losses(
        self, features: Sequence[Tensor], samples: RoISamples, targets: Sequence[Target], sizes: Sequence[Size]
    ) -> dict[str, Tensor]:
        """Scalar losses `cls` and `box`, weighted sums over the stages, in float32.

        Args:
            features: L x (B, C, H, W).
            samples: from `sample`.
            targets: per image, without crowd; the later stages match their boxes to them.
            sizes: valid (H, W) of every image in pixels of the input.
        """
        terms = []
        for stage, following, weight in zip(
            self._stages(), [*self._stages()[1:], None], self.loss_weights, strict=True
        ):
            logits, deltas = box_outputs(stage, features, samples.boxes)
            terms.append(torch.stack(box_losses(logits, deltas, samples, self.beta)) * weight)
            if following is not None:
                samples = _match(following, _refine(stage, deltas, samples.boxes, sizes), targets)
        cls, box = torch.stack(terms).sum(0)
        return {"cls": cls, "box": box}

    def detections(
        self, features: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[Size]
    ) -> list[Detections]:
        """As `FastRCNN.detections`."""
        *earlier, last = self._stages()
        boxes = list(proposals)
        probabilities = []
        for stage in earlier:
            logits, deltas = box_outputs(stage, features, boxes)
            probabilities.append(logits.softmax(1))
            boxes = _refine(stage, deltas, boxes, sizes)
        logits, deltas = box_outputs(last, features, boxes)
        mean = torch.stack([*probabilities, logits.softmax(1)]).mean(0)
        return select_detections(last, mean.log(), deltas, boxes, sizes)

    def _stages(self) -> list[RoIHeads]:
        return cast(list[RoIHeads], list(self.stages))


@torch.no_grad()
def _refine(stage: RoIHeads, deltas: Tensor, boxes: Sequence[Tensor], sizes: Sequence[Size]) -> list[Tensor]:
    """The boxes that a stage proposes to the next, clipped to the images."""
    better = stage.box_coder.decode_single(deltas[:, 4:8], torch.cat(list(boxes)))
    parts = better.split([len(part) for part in boxes])
    return [clip_boxes_to_image(part, size) for part, size in zip(parts, sizes, strict=True)]


@torch.no_grad()
def _match(stage: RoIHeads, boxes: list[Tensor], targets: Sequence[Target]) -> RoISamples:
    """All boxes as samples of a stage."""
    known = as_torchvision(targets)
    places = [target["boxes"] for target in known]
    matched, labels = stage.assign_targets_to_proposals(boxes, places, [target["labels"] for target in known])
    wanted = [
        place[index] if len(place) else torch.zeros_like(part)
        for place, index, part in zip(places, matched, boxes, strict=True)
    ]
    return RoISamples(boxes, matched, labels, list(stage.box_coder.encode(wanted, boxes)))
