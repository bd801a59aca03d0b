"""A predictor of one's own: one square anchor per position that belongs to the box it overlaps most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from dyndet.models.detectors.base import RawMaps
from dyndet.models.predictors.anchor_based import AnchorPredictor
from dyndet.models.predictors.anchors import AnchorGrid, BoxCoder
from dyndet.models.predictors.iou_assign import IoUAssigner
from dyndet.models.predictors.maps import flat_levels
from dyndet.models.predictors.postprocess import Postprocess
from dyndet.structures import Target


class NearestPredictor(AnchorPredictor):
    """Focal loss and L1; convolutions, anchors and decoding are those of every predictor with anchors."""

    def __init__(self, channels: int, strides: Sequence[int], *, num_classes: int, scale: float = 3.0) -> None:
        super().__init__(
            channels, strides, num_classes=num_classes, anchors=AnchorGrid([scale]), coder=BoxCoder(), kernel=1,
            separable=False, prior=0.01, postprocess=Postprocess(), ignore_padding=True, valid_divisor=None,
        )  # fmt: skip
        self.assigner = IoUAssigner()

    def losses(
        self, raw: RawMaps, targets: Sequence[Target], valid: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        levels = self.level_anchors(raw)
        trained = self.trained_anchors(raw, valid)
        matched = self.match(self.assigner, levels, targets, trained)
        counts = matched.labels >= 0 if trained is None else (matched.labels >= 0) & trained
        positive = counts & (matched.labels < self.num_classes)
        number = positive.sum().clamp(min=1)
        one_hot = F.one_hot(matched.labels.clamp(min=0), self.num_classes + 1)[..., :-1].float()
        cls = sigmoid_focal_loss(flat_levels(raw, "cls", self.num_classes), one_hot).sum(-1)
        anchors = torch.cat(levels).expand(len(targets), -1, -1)[positive]
        deltas = self.coder.encode(anchors, matched.boxes[positive])
        box = F.l1_loss(flat_levels(raw, "box", 4)[positive], deltas, reduction="sum")
        return {"cls": (cls * counts).sum() / number, "box": box / number}
