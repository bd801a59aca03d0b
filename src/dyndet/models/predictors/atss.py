"""The ATSS predictor: one square anchor per position, with centerness; its losses and its decoding.

Source: Zhang et al., CVPR 2020, arXiv:1912.02424; conventions of mmdetection by default, those of the authors' code as
arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from dyndet.models.detectors.base import RawMaps
from dyndet.models.heads.init import fill_bias
from dyndet.models.predictors.anchor_based import AnchorPredictor
from dyndet.models.predictors.anchors import AnchorGrid, BoxCoder
from dyndet.models.predictors.atss_assign import AdaptiveAssigner
from dyndet.models.predictors.maps import flat, flat_levels
from dyndet.models.predictors.normalise import Normaliser
from dyndet.models.predictors.postprocess import Postprocess
from dyndet.ops.boxes import centerness_from_ltrb
from dyndet.ops.distributed import reduce_mean
from dyndet.structures import HeadOutput, Target


class ATSS(AnchorPredictor):
    """Predicts from the features of any head.

    Args:
        channels: C of the features.
        strides: per level.
        num_classes: K.
        scale: side of an anchor in strides.
        center_offset: where in its cell an anchor's centre lies, in strides (0 mmdetection, 0.5 the authors).
        kernel: of the last convolutions (3 mmdetection, 1 the authors).
        prior: probability at which classification starts.
        assigner: which box an anchor answers for; None takes the nine nearest per level.
        normaliser: divisor of classification and centerness loss; None counts "images".
        box_weight: of the box loss.
        box_normaliser_min: floor of the summed centerness that divides the box loss (1 mmdetection, 0 the authors).
        postprocess: None takes 0.05, 1000 per level by probability, 0.6, 100; the authors rank by final score and clip
            after NMS.
        ignore_padding: see `AnchorPredictor`.
        valid_divisor: see `AnchorPredictor`.
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        *,
        num_classes: int,
        scale: float = 8.0,
        center_offset: float = 0.0,
        kernel: int = 3,
        prior: float = 0.01,
        assigner: AdaptiveAssigner | None = None,
        normaliser: Normaliser | None = None,
        box_weight: float = 2.0,
        box_normaliser_min: float = 1.0,
        postprocess: Postprocess | None = None,
        ignore_padding: bool = True,
        valid_divisor: int | None = None,
    ) -> None:
        super().__init__(
            channels,
            strides,
            num_classes=num_classes,
            anchors=AnchorGrid([scale], offset=center_offset),
            coder=BoxCoder((0.1, 0.1, 0.2, 0.2)),
            kernel=kernel,
            separable=False,
            prior=prior,
            postprocess=postprocess or Postprocess(),
            ignore_padding=ignore_padding,
            valid_divisor=valid_divisor,
        )
        self.centerness = nn.Conv2d(channels, 1, kernel, padding=kernel // 2)
        nn.init.normal_(self.centerness.weight, std=0.01)
        fill_bias(self.centerness, 0.0)
        self.scales = nn.Parameter(torch.ones(len(strides)))
        self.assigner = assigner or AdaptiveAssigner()
        self.normaliser = normaliser or Normaliser("images")
        self.box_weight = box_weight
        self.box_normaliser_min = box_normaliser_min

    def forward(self, head: HeadOutput) -> RawMaps:
        """Per level `cls` (B, K, H, W) logits, `box` (B, 4, H, W) deltas, `centerness` (B, 1, H, W) logits."""
        maps = []
        for scale, cls, reg in zip(self.scales, head.cls, head.reg, strict=True):
            maps.append({"cls": self.cls(cls), "box": self.box(reg) * scale, "centerness": self.centerness(reg)})
        return maps

    def losses(
        self, raw: RawMaps, targets: Sequence[Target], valid: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Scalar losses `cls` (focal), `box` (GIoU, weighted by centerness) and `centerness`; see `AnchorPredictor`."""
        levels = self.level_anchors(raw)
        trained = self.trained_anchors(raw, valid)
        matched = self.match(self.assigner, levels, targets, trained)
        labels = matched.labels
        positive = labels < self.num_classes
        divisor = self.normaliser(positive.sum(1))

        cls = flat_levels(raw, "cls", self.num_classes)
        one_hot = F.one_hot(labels, self.num_classes + 1)[..., :-1].float()
        each = sigmoid_focal_loss(cls, one_hot, alpha=0.25, gamma=2.0).sum(-1)
        loss_cls = ((each if trained is None else each * trained).sum(1) / divisor).sum()

        anchors = torch.cat(levels).expand(len(labels), -1, -1)[positive]
        boxes = matched.boxes[positive]
        centre = (anchors[:, :2] + anchors[:, 2:]) / 2
        ideal = centerness_from_ltrb(torch.cat([centre - boxes[:, :2], boxes[:, 2:] - centre], 1))
        decoded = self.coder.decode(anchors, flat_levels(raw, "box", 4)[positive])
        total = reduce_mean(ideal.sum()).clamp(min=max(self.box_normaliser_min, 1e-6))
        loss_box = self.box_weight * (generalized_box_iou_loss(decoded, boxes) * ideal).sum() / total
        predicted = flat_levels(raw, "centerness", 1)[..., 0][positive]
        quality = F.binary_cross_entropy_with_logits(predicted, ideal, reduction="none")
        loss_centerness = (quality / divisor[:, None].expand_as(labels)[positive]).sum()
        return {"cls": loss_cls, "box": loss_box, "centerness": loss_centerness}

    def final_scores(self, probabilities: Tensor, level: dict[str, Tensor]) -> Tensor:
        return probabilities * flat(level["centerness"], 1).sigmoid()
