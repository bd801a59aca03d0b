"""The second stage: what each proposal holds, and where exactly (Fast R-CNN on an FPN).

Source: Girshick, Fast R-CNN, ICCV 2015, arXiv:1504.08083; Lin et al., FPN, CVPR 2017, arXiv:1612.03144.

Sampling and the selection of detections are torchvision's, and so is where it keeps background: logit 0, class c at
logit c + 1 (detectron2 and mmdetection: last). Deltas exist for the K classes only. The other conventions are
detectron2's.
Legend: B images, K classes, L levels, R regions of all images, S x S pooled positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import roi_align

from dyndet.models.predictors.maps import check_labels
from dyndet.structures import Detections, Size, Target

DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
"""Of x, y, w, h: one over the standard deviations (0.1, 0.1, 0.2, 0.2)."""


@dataclass
class RoISamples:
    """Regions that train, per image.

    Attributes:
        boxes: (R_i, 4) xyxy in pixels of the input.
        matched: (R_i,) index of the target each belongs to; 0 for background.
        labels: (R_i,) 0 for background, c + 1 for class c.
        deltas: (R_i, 4) from the region to its target; garbage for background.
    """

    boxes: list[Tensor]
    matched: list[Tensor]
    labels: list[Tensor]
    deltas: list[Tensor]


class RoIPredictor(Protocol):
    """Any second stage: `FastRCNN`, `CascadeRCNN`, `MaskRCNN`.

    Attributes:
        num_classes: K.
        size: S of the regions that a call takes.
        max_detections: per image.
    """

    num_classes: int
    size: int
    max_detections: int

    def __call__(self, regions: Tensor) -> Any: ...

    def sample(self, proposals: Sequence[Tensor], targets: Sequence[Target]) -> RoISamples: ...

    def losses(
        self, features: Sequence[Tensor], samples: RoISamples, targets: Sequence[Target], sizes: Sequence[Size]
    ) -> dict[str, Tensor]: ...

    def detections(
        self, features: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[Size]
    ) -> list[Detections]: ...


class PyramidRoIAlign(nn.Module):
    """RoIAlign from the level that fits a box: floor(4 + log2(sqrt(area) / 224)) is log2 of its stride (FPN, Eq. 1).

    Unlike torchvision's `MultiScaleRoIAlign` it samples at pixel centres, and knows the strides instead of guessing
    them from its first image.

    Args:
        strides: per level, powers of 2.
        size: S.
        max_stride: coarser levels are for proposals only (32: P2 to P5 of P2 to P6).
        sampling_ratio: samples per bin and axis; 0 takes as many as the bin has positions.
        aligned: half-pixel shift (detectron2); False samples at corners, as torchvision's Faster R-CNN does.
    """

    def __init__(
        self,
        strides: Sequence[int],
        *,
        size: int = 7,
        max_stride: int = 32,
        sampling_ratio: int = 0,
        aligned: bool = True,
    ) -> None:
        super().__init__()
        self.strides = [stride for stride in strides if stride <= max_stride]
        self.size = size
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def levels(self, boxes: Tensor) -> Tensor:
        """(R, 4) -> (R,) index of the level each is read from."""
        sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1).sqrt()
        power = torch.floor(4 + torch.log2(sides / 224 + 1e-8))  # log2 of the stride
        first, last = math.log2(self.strides[0]), math.log2(self.strides[-1])
        return (power.clamp(first, last) - first).long()

    def forward(self, features: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """L x (B, C, H, W) and per image (R_i, 4) -> (R, C, S, S), sampled in float32."""
        index = [torch.full_like(part[:, :1], image) for image, part in enumerate(boxes)]
        regions = torch.cat([torch.cat(index), torch.cat(list(boxes))], 1)
        levels = self.levels(regions[:, 1:])
        pooled = features[0].new_zeros(len(regions), features[0].shape[1], self.size, self.size)
        for level, (maps, stride) in enumerate(zip(features, self.strides, strict=False)):
            here = (levels == level).nonzero()[:, 0]
            sampled = roi_align(
                maps.float(), regions[here].float(), self.size, 1 / stride, self.sampling_ratio, self.aligned
            )
            pooled[here] = sampled.to(pooled.dtype)
        return pooled


class BoxHead(nn.Module):
    """Two fully connected layers with ReLU, then a class and box deltas.

    Args:
        channels: C of the features.
        size: S.
        num_classes: K.
        class_agnostic: one set of deltas for all classes instead of one for each.
        hidden: width of the two layers.
    """

    def __init__(
        self, channels: int, *, size: int, num_classes: int, class_agnostic: bool = False, hidden: int = 1024
    ) -> None:
        super().__init__()
        self.layers = TwoMLPHead(channels * size * size, hidden)
        self.cls = nn.Linear(hidden, num_classes + 1)
        self.box = nn.Linear(hidden, 4 if class_agnostic else 4 * num_classes)
        for layer in (self.layers.fc6, self.layers.fc7):
            nn.init.kaiming_uniform_(layer.weight, a=1)  # Caffe2's Xavier
        nn.init.normal_(self.cls.weight, std=0.01)
        nn.init.normal_(self.box.weight, std=0.001)
        for layer in (self.layers.fc6, self.layers.fc7, self.cls, self.box):
            nn.init.zeros_(layer.bias)
        self.num_classes = num_classes
        self.class_agnostic = class_agnostic

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C, S, S) -> logits (R, K + 1), and deltas (R, 4 (K + 1)): zeros for background, then class by class."""
        hidden = self.layers(regions)
        deltas = self.box(hidden)
        every = deltas.repeat(1, self.num_classes) if self.class_agnostic else deltas
        return self.cls(hidden), torch.cat([torch.zeros_like(every[:, :4]), every], 1)


def box_stage(
    head: nn.Module,
    pool: PyramidRoIAlign,
    *,
    iou: float = 0.5,
    weights: Sequence[float] = DELTA_WEIGHTS,
    samples: int = 512,
    positive_fraction: float = 0.25,
    score_threshold: float = 0.05,
    nms_iou: float = 0.5,
    max_detections: int = 100,
) -> RoIHeads:
    """Torchvision's RoI heads around a box head; arguments as of `FastRCNN`."""
    return RoIHeads(
        box_roi_pool=pool,
        box_head=head,
        box_predictor=nn.Identity(),
        fg_iou_thresh=iou,
        bg_iou_thresh=iou,
        batch_size_per_image=samples,
        positive_fraction=positive_fraction,
        bbox_reg_weights=tuple(weights),
        score_thresh=score_threshold,
        nms_thresh=nms_iou,
        detections_per_img=max_detections,
    )


def box_outputs(stage: RoIHeads, features: Sequence[Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (R, K + 1) and deltas (R, 4 (K + 1)) of the boxes of all images, float32."""
    logits, deltas = stage.box_head(stage.box_roi_pool(features, boxes))
    return logits.float(), deltas.float()


def box_losses(logits: Tensor, deltas: Tensor, samples: RoISamples, beta: float) -> tuple[Tensor, Tensor]:
    """Cross entropy of all regions, and smooth L1 of the positive ones; both summed and divided by the regions."""
    labels = torch.cat(samples.labels)
    count = max(len(labels), 1)
    positive = (labels > 0).nonzero()[:, 0]
    predicted = deltas.view(len(deltas), deltas.shape[1] // 4, 4)[positive, labels[positive]]
    box = F.smooth_l1_loss(predicted, torch.cat(samples.deltas)[positive], beta=beta, reduction="sum")
    return F.cross_entropy(logits, labels, reduction="sum") / count, box / count


def as_torchvision(targets: Sequence[Target]) -> list[dict[str, Tensor]]:
    """Boxes, and labels that start at 1."""
    return [{"boxes": target.boxes.float(), "labels": target.labels + 1} for target in targets]


class FastRCNN(nn.Module):
    """Classifies and refines proposals.

    Args:
        channels: C of the features.
        strides: per level.
        num_classes: K.
        head: called with `channels`, `size`, `num_classes` and `class_agnostic`; maps (R, C, S, S) to what `BoxHead`
            returns.
        class_agnostic: one set of deltas for all classes.
        size: S.
        max_stride: coarser levels are not read.
        samples: regions per image that train; the boxes themselves are among the candidates.
        positive_fraction: at most this share of them is positive.
        iou: regions that overlap a box at least so much belong to it; all others are background.
        weights: what the deltas x, y, w, h are multiplied by.
        beta: where smooth L1 turns from quadratic to linear; 0 is L1 (torchvision: 1/9).
        score_threshold: detections must exceed it.
        nms_iou: boxes of one class that overlap a better one by more are dropped.
        max_detections: per image.
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        *,
        num_classes: int,
        head: Callable[..., nn.Module] = BoxHead,
        class_agnostic: bool = False,
        size: int = 7,
        max_stride: int = 32,
        samples: int = 512,
        positive_fraction: float = 0.25,
        iou: float = 0.5,
        weights: Sequence[float] = DELTA_WEIGHTS,
        beta: float = 0.0,
        score_threshold: float = 0.05,
        nms_iou: float = 0.5,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        self.stage = box_stage(
            head(channels=channels, size=size, num_classes=num_classes, class_agnostic=class_agnostic),
            PyramidRoIAlign(strides, size=size, max_stride=max_stride),
            iou=iou,
            weights=weights,
            samples=samples,
            positive_fraction=positive_fraction,
            score_threshold=score_threshold,
            nms_iou=nms_iou,
            max_detections=max_detections,
        )
        self.size = size
        self.num_classes = num_classes
        self.max_detections = max_detections
        self.beta = beta

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C, S, S) pooled features -> logits and deltas, as `BoxHead`; the part that costs multiply-adds."""
        return self.stage.box_head(regions)

    @torch.no_grad()
    def sample(self, proposals: Sequence[Tensor], targets: Sequence[Target]) -> RoISamples:
        """Draws the regions that train from the proposals and the boxes themselves.

        Args:
            proposals: per image (P, 4) xyxy in pixels of the input.
            targets: per image, without crowd; boxes must have an area.

        Raises:
            ValueError: if a label is not in 0..K-1.
        """
        check_labels(targets, self.num_classes)
        return RoISamples(*self.stage.select_training_samples(list(proposals), as_torchvision(targets)))

    def losses(
        self, features: Sequence[Tensor], samples: RoISamples, targets: Sequence[Target], sizes: Sequence[Size]
    ) -> dict[str, Tensor]:
        """Scalar losses `cls` and `box`, in float32.

        Args:
            features: L x (B, C, H, W).
            samples: from `sample`.
            targets: not read: the samples know theirs.
            sizes: not read.
        """
        cls, box = box_losses(*box_outputs(self.stage, features, samples.boxes), samples, self.beta)
        return {"cls": cls, "box": box}

    def detections(
        self, features: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[Size]
    ) -> list[Detections]:
        """Detections per image, in pixels of the input, best first.

        Args:
            features: L x (B, C, H, W).
            proposals: per image (P, 4) xyxy in pixels of the input.
            sizes: valid (H, W) of every image in the same pixels.
        """
        logits, deltas = box_outputs(self.stage, features, proposals)
        return select_detections(self.stage, logits, deltas, proposals, sizes)


def select_detections(
    stage: RoIHeads, logits: Tensor, deltas: Tensor, proposals: Sequence[Tensor], sizes: Sequence[Size]
) -> list[Detections]:
    """Decodes, clips, thresholds, and suppresses class by class."""
    boxes, scores, labels = stage.postprocess_detections(logits, deltas, list(proposals), list(sizes))
    return [Detections(b, s, label - 1) for b, s, label in zip(boxes, scores, labels, strict=True)]
