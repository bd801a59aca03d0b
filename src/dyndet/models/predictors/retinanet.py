"""The RetinaNet predictor: nine anchors per position, focal loss, box deltas.

Source: Lin et al., ICCV 2017, arXiv:1708.02002; conventions of mmdetection by default, those of detectron2 and
torchvision as arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from dyndet.models.detectors.base import RawMaps
from dyndet.models.predictors.anchor_based import AnchorPredictor
from dyndet.models.predictors.anchors import AnchorGrid, BoxCoder
from dyndet.models.predictors.iou_assign import IoUAssigner
from dyndet.models.predictors.maps import flat_levels
from dyndet.models.predictors.normalise import Normaliser
from dyndet.models.predictors.postprocess import Postprocess
from dyndet.structures import Target


class RetinaNet(AnchorPredictor):
    """Predicts from the features of any head; published towers have four convolutions without norm.

    Args:
        channels: C of the features.
        strides: per level.
        num_classes: K.
        anchors: shapes at every position; None takes nine, 32 to 813 pixels on strides 8 to 128.
        coder: how boxes are written; None takes plain deltas.
        kernel: of the last convolutions.
        separable: they are depthwise-separable (EfficientDet).
        prior: probability at which classification starts.
        assigner: None takes 0.5 / 0.4 with low-quality matches.
        normaliser: None counts "images".
        alpha: of the focal loss.
        gamma: of the focal loss.
        beta: where the box loss turns from L2 to L1, in deltas; 0 is L1 (0.1 detectron2).
        box_weight: of the box loss (50 in EfficientDet).
        postprocess: None takes 0.05, 1000 per level, 0.5, 100 (300 torchvision); detectron2 clips after NMS.
        ignore_padding: see `AnchorPredictor`.
        valid_divisor: see `AnchorPredictor`.
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        *,
        num_classes: int,
        anchors: AnchorGrid | None = None,
        coder: BoxCoder | None = None,
        kernel: int = 3,
        separable: bool = False,
        prior: float = 0.01,
        assigner: IoUAssigner | None = None,
        normaliser: Normaliser | None = None,
        alpha: float = 0.25,
        gamma: float = 2.0,
        beta: float = 0.0,
        box_weight: float = 1.0,
        postprocess: Postprocess | None = None,
        ignore_padding: bool = True,
        valid_divisor: int | None = None,
    ) -> None:
        super().__init__(
            channels,
            strides,
            num_classes=num_classes,
            anchors=anchors or AnchorGrid.octaves(),
            coder=coder or BoxCoder(),
            kernel=kernel,
            separable=separable,
            prior=prior,
            postprocess=postprocess or Postprocess(iou_threshold=0.5),
            ignore_padding=ignore_padding,
            valid_divisor=valid_divisor,
        )
        self.assigner = assigner or IoUAssigner()
        self.normaliser = normaliser or Normaliser("images")
        self.alpha = alpha
        self.gamma = gamma
        self.beta = beta
        self.box_weight = box_weight

    def losses(
        self, raw: RawMaps, targets: Sequence[Target], valid: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Scalar losses `cls` (focal) and `box` (smooth L1 of deltas); see `AnchorPredictor`."""
        levels = self.level_anchors(raw)
        trained = self.trained_anchors(raw, valid)
        matched = self.match(self.assigner, levels, targets, trained)
        labels = matched.labels
        counts = labels >= 0
        if trained is not None:
            counts = counts & trained
        positive = counts & (labels < self.num_classes)
        divisor = self.normaliser(positive.sum(1))

        cls = flat_levels(raw, "cls", self.num_classes)
        wanted = F.one_hot(labels.clamp(min=0), self.num_classes + 1)[..., :-1].float()
        each = sigmoid_focal_loss(cls, wanted, alpha=self.alpha, gamma=self.gamma).sum(-1)
        loss_cls = ((each * counts).sum(1) / divisor).sum()

        anchors = torch.cat(levels).expand(len(labels), -1, -1)[positive]
        deltas = self.coder.encode(anchors, matched.boxes[positive])
        away = F.smooth_l1_loss(flat_levels(raw, "box", 4)[positive], deltas, reduction="none", beta=self.beta)
        share = cast(Tensor, divisor[:, None].expand_as(labels))[positive]
        return {"cls": loss_cls, "box": self.box_weight * (away.sum(1) / share).sum()}
