"""The FCOS predictor: classification, box distances and centerness per position; its losses and its decoding.

Source: Tian et al., ICCV 2019, arXiv:1904.01355. The defaults are the settings published with the fine-grained head
(Song et al., arXiv:2012.03519); `conf/predictor/fcos_mmdet.yaml` holds the "improved" ones of another common
implementation.
Legend: B images, K classes, L levels, P points of all levels, N boxes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from dyndet.models.detectors.base import Branch, RawMaps
from dyndet.models.heads.init import fill_bias, init_normal
from dyndet.models.predictors.fcos_assign import CenterSampling, PointTargets
from dyndet.models.predictors.maps import check_kernel, check_labels, flat, flat_levels, level_shares, shapes_of
from dyndet.models.predictors.normalise import Normaliser
from dyndet.models.predictors.postprocess import Postprocess
from dyndet.ops.boxes import boxes_from_ltrb, centerness_from_ltrb, iou_log_loss
from dyndet.ops.distributed import reduce_mean
from dyndet.ops.grid import level_points
from dyndet.structures import Detections, HeadOutput, ImageBatch, Target

_LARGEST = 12.0  # e^12 pixels are more than any image has, and finite


class FCOS(nn.Module):
    """Predicts from the features of any head.

    Args:
        channels: C of the features.
        strides: per level.
        num_classes: K.
        prior: probability at which classification starts.
        centerness_on: the tower whose features centerness reads.
        box_activation: "relu" (distances in strides) or "exp" (distances in pixels).
        initial_distance: what the box convolution's bias starts at, before the activation. Published is 0, where half
            of all distances start without gradient; short schedules do better from a few strides.
        point_offset: where in its cell a point lies, in strides: 0 published, 0.5 elsewhere.
        assigner: which box a point answers for; None is centre sampling with radius 1.5.
        alpha: of the focal loss.
        gamma: of the focal loss. With published alpha and gamma a place that is sure of the object but not of its class
            has a small gradient beside that of its box: short schedules learn classes faster with 0.5 and 1.
        cls_weight: of the classification loss.
        box_loss: "giou" (Rezatofighi et al., CVPR 2019, arXiv:1902.09630), or "iou" for -log(IoU).
        box_normaliser_min: floor of the summed centerness that divides the box loss (1 published, 1e-6 elsewhere).
        kernel: of the last convolutions.
        level_scales: box maps are multiplied by one learnable number per level (not in detectron2).
        box_weighting: the box loss is weighted by "centerness" and divided by its sum, or "uniform" and divided like
            the others (detectron2).
        normaliser: divisor of classification and centerness loss; None takes "total".
        score: final score is "sqrt" sqrt(cls * centerness), as published, or "product".
        postprocess: threshold, top-k and NMS; None takes 0.05, 1000 per level, 0.6, 100.
        ignore_padding: leave points on padding out of losses and detections (the published code keeps them).
    """

    reads: tuple[Branch, ...] = ("cls", "reg")

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        *,
        num_classes: int,
        prior: float = 0.01,
        centerness_on: Literal["reg", "cls"] = "reg",
        box_activation: Literal["relu", "exp"] = "relu",
        initial_distance: float = 0.0,
        point_offset: float = 0.0,
        assigner: CenterSampling | None = None,
        alpha: float = 0.25,
        gamma: float = 2.0,
        cls_weight: float = 1.0,
        box_loss: Literal["giou", "iou"] = "giou",
        box_normaliser_min: float = 1.0,
        kernel: int = 3,
        level_scales: bool = True,
        box_weighting: Literal["centerness", "uniform"] = "centerness",
        normaliser: Normaliser | None = None,
        score: Literal["sqrt", "product"] = "sqrt",
        postprocess: Postprocess | None = None,
        ignore_padding: bool = True,
    ) -> None:
        super().__init__()
        for key, value, allowed in (
            ("centerness_on", centerness_on, ("reg", "cls")),
            ("box_activation", box_activation, ("relu", "exp")),
            ("box_loss", box_loss, ("giou", "iou")),
            ("box_weighting", box_weighting, ("centerness", "uniform")),
            ("score", score, ("sqrt", "product")),
        ):
            if value not in allowed:
                raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {value!r}")
        check_kernel(kernel)
        self.cls = nn.Conv2d(channels, num_classes, kernel, padding=kernel // 2)
        self.box = nn.Conv2d(channels, 4, kernel, padding=kernel // 2)
        self.centerness = nn.Conv2d(channels, 1, kernel, padding=kernel // 2)
        init_normal(self)
        fill_bias(self.cls, -math.log((1 - prior) / prior))
        fill_bias(self.box, initial_distance)
        self.scales = nn.Parameter(torch.ones(len(strides))) if level_scales else None
        self.strides = list(strides)
        self.num_classes = num_classes
        self.centerness_on = centerness_on
        self.box_activation = box_activation
        self.point_offset = point_offset
        self.assigner = assigner or CenterSampling()
        self.alpha = alpha
        self.gamma = gamma
        self.cls_weight = cls_weight
        self.box_loss = box_loss
        self.box_normaliser_min = box_normaliser_min
        self.box_weighting = box_weighting
        self.normaliser = normaliser or Normaliser("total")
        self.score = score
        self.postprocess = postprocess or Postprocess()
        self.ignore_padding = ignore_padding

    def forward(self, head: HeadOutput) -> RawMaps:
        """Per level `cls` (B, K, H, W) logits, `box` (B, 4, H, W) unactivated, `centerness` (B, 1, H, W) logits."""
        maps = []
        for level, (cls, reg) in enumerate(zip(head.cls, head.reg, strict=True)):
            box = self.box(reg)
            if self.scales is not None:
                box = box * self.scales[level]
            centerness = self.centerness(reg if self.centerness_on == "reg" else cls)
            maps.append({"cls": self.cls(cls), "box": box, "centerness": centerness})
        return maps

    def losses(
        self, raw: RawMaps, targets: Sequence[Target], valid: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Scalar losses `cls` (focal), `box` and `centerness`, in float32.

        Args:
            raw: from `forward`.
            targets: per image, without crowd.
            valid: L x (B, 1, H, W) bool, False on padding.

        Raises:
            ValueError: if a label is not in 0..K-1.
        """
        points = self._points(raw)
        assigned = self._assigned(points, targets)
        labels = torch.stack([item.labels for item in assigned])
        cls = flat_levels(raw, "cls", self.num_classes)
        box = flat_levels(raw, "box", 4)
        centerness = flat_levels(raw, "centerness", 1)[..., 0]
        counts = torch.ones_like(labels, dtype=torch.bool)
        if valid is not None and self.ignore_padding:
            counts = torch.cat([mask.flatten(1) for mask in valid], 1)
        positive = (labels < self.num_classes) & counts
        divisor = self.normaliser(positive.sum(1))

        one_hot = F.one_hot(labels, self.num_classes + 1)[..., :-1].float()
        each = sigmoid_focal_loss(cls, one_hot, alpha=self.alpha, gamma=self.gamma).sum(-1)
        loss_cls = self.cls_weight * ((each * counts).sum(1) / divisor).sum()

        stride = torch.cat([p.new_full((len(p),), s) for p, s in zip(points, self.strides, strict=True)])
        stride = stride.expand_as(labels)[positive][:, None]
        ltrb = torch.stack([item.ltrb for item in assigned])[positive] / stride
        predicted = self._distances(box[positive], stride) / stride
        ideal = centerness_from_ltrb(ltrb)
        # Distances around a common origin: IoU does not depend on where the point is.
        origin = torch.zeros_like(ltrb[:, :2])
        pair = boxes_from_ltrb(origin, predicted), boxes_from_ltrb(origin, ltrb)
        each = generalized_box_iou_loss(*pair) if self.box_loss == "giou" else iou_log_loss(*pair)
        share = divisor[:, None].expand_as(labels)[positive]
        if self.box_weighting == "uniform":
            loss_box = (each / share).sum()
        else:
            total = reduce_mean(ideal.sum()).clamp(min=max(self.box_normaliser_min, 1e-6))
            loss_box = (each * ideal).sum() / total
        quality = F.binary_cross_entropy_with_logits(centerness[positive], ideal, reduction="none")
        return {"cls": loss_cls, "box": loss_box, "centerness": (quality / share).sum()}

    @torch.no_grad()
    def positive_shares(self, raw: RawMaps, targets: Sequence[Target], valid: Sequence[Tensor] | None = None) -> Tensor:
        """The (L,) share of every level's points that answer for an object; arguments as of `losses`."""
        points = self._points(raw)
        labels = torch.stack([item.labels for item in self._assigned(points, targets)])
        positive = (labels < self.num_classes).split([len(level) for level in points], 1)
        return level_shares(positive, valid if self.ignore_padding else None)

    def detections(self, raw: RawMaps, images: ImageBatch, valid: Sequence[Tensor] | None = None) -> list[Detections]:
        """Detections per image, in pixels of the original images.

        Args:
            raw: from `forward`.
            images: for the valid and the original sizes.
            valid: L x (B, 1, H, W) bool, False on padding.
        """
        points = self._points(raw)
        levels = []
        for index, (level, stride, where) in enumerate(zip(raw, self.strides, points, strict=True)):
            probabilities = flat(level["cls"], self.num_classes).sigmoid()
            if valid is not None and self.ignore_padding:
                probabilities = probabilities * valid[index].flatten(2).transpose(1, 2)
            quality = flat(level["centerness"], 1).sigmoid()
            scores = probabilities * quality
            ltrb = self._distances(flat(level["box"], 4), torch.tensor(float(stride)))
            boxes = boxes_from_ltrb(where, ltrb)
            levels.append((probabilities, scores.sqrt() if self.score == "sqrt" else scores, boxes))
        return self.postprocess(levels, images)

    def _assigned(self, points: Sequence[Tensor], targets: Sequence[Target]) -> list[PointTargets]:
        check_labels(targets, self.num_classes)
        return [self.assigner(points, self.strides, target, self.num_classes) for target in targets]

    def _distances(self, box: Tensor, stride: Tensor) -> Tensor:
        """(..., 4) distances in pixels from the raw box values."""
        return F.relu(box) * stride.to(box) if self.box_activation == "relu" else box.clamp(max=_LARGEST).exp()

    def _points(self, raw: RawMaps) -> list[Tensor]:
        device = raw[0]["cls"].device
        return [
            level_points(shape, stride, self.point_offset, device)
            for shape, stride in zip(shapes_of(raw), self.strides, strict=True)
        ]
