"""The FreeAnchor predictor: RetinaNet's network, trained without assigning anchors.

Source: Zhang et al., NeurIPS 2019, arXiv:1909.02466, in the conventions of mmdetection.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from dyndet.models.detectors.base import RawMaps
from dyndet.models.predictors.anchor_based import AnchorPredictor
from dyndet.models.predictors.anchors import AnchorGrid, BoxCoder
from dyndet.models.predictors.maps import check_labels, flat_levels
from dyndet.models.predictors.postprocess import Postprocess
from dyndet.ops.boxes import chunks_of
from dyndet.ops.distributed import reduce_mean
from dyndet.structures import Target

_EPS = 1e-12


class FreeAnchor(AnchorPredictor):
    """Every box picks from a bag of anchors by how well they classify and locate it, as one likelihood.

    Args:
        channels: C of the features.
        strides: per level.
        num_classes: K.
        anchors: shapes at every position; None takes RetinaNet's nine.
        prior: probability at which classification starts.
        bag_size: anchors per box, those that overlap it most.
        threshold: a predicted box that overlaps an object by more than this counts less as background, up to the one
            that overlaps it most, which does not count at all.
        alpha: weight of the positive bags; 1 - alpha that of the background.
        gamma: of the background's focal loss.
        beta: where the box loss turns from L2 to L1, in deltas.
        box_weight: of the box loss inside the likelihood.
        postprocess: None takes 0.05, 1000 per level, 0.5, 100.
        ignore_padding: see `AnchorPredictor`; mmdetection keeps all anchors.
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        *,
        num_classes: int,
        anchors: AnchorGrid | None = None,
        prior: float = 0.01,
        bag_size: int = 50,
        threshold: float = 0.6,
        alpha: float = 0.5,
        gamma: float = 2.0,
        beta: float = 0.11,
        box_weight: float = 0.75,
        postprocess: Postprocess | None = None,
        ignore_padding: bool = True,
    ) -> None:
        super().__init__(
            channels,
            strides,
            num_classes=num_classes,
            anchors=anchors or AnchorGrid.octaves(),
            coder=BoxCoder((0.1, 0.1, 0.2, 0.2)),
            kernel=3,
            separable=False,
            prior=prior,
            postprocess=postprocess or Postprocess(iou_threshold=0.5),
            ignore_padding=ignore_padding,
            valid_divisor=None,
        )
        if bag_size < 1:
            raise ValueError(f"bag_size must be at least 1, got {bag_size}")
        self.bag_size = bag_size
        self.threshold = threshold
        self.alpha = alpha
        self.gamma = gamma
        self.beta = beta
        self.box_weight = box_weight

    def losses(
        self, raw: RawMaps, targets: Sequence[Target], valid: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Scalar losses `positive` (bags) and `negative` (background); see `AnchorPredictor`."""
        check_labels(targets, self.num_classes)
        anchors = torch.cat(self.level_anchors(raw))
        trained = self.trained_anchors(raw, valid)
        cls, deltas = flat_levels(raw, "cls", self.num_classes), flat_levels(raw, "box", 4)
        bags, background, unused = [], [], []
        for index, target in enumerate(targets):
            here = slice(None) if trained is None else trained[index]
            logits, moves, places = cls[index][here], deltas[index][here], anchors[here]
            bags.append(self._bags(logits, moves, places, target))
            background.append(self._background(logits, moves, places, target))
            unused.append(moves.sum() * 0)
        objects = sum(len(target.boxes) for target in targets)
        number = reduce_mean(torch.tensor(float(objects), device=cls.device))
        positive = torch.cat(bags).sum() / number.clamp(min=1) + torch.stack(unused).sum()  # gradients in every batch
        negative = torch.stack(background).sum() / (number * self.bag_size).clamp(min=1)
        return {"positive": positive, "negative": negative}

    def positive_anchors(self, raw: RawMaps, targets: Sequence[Target], trained: Tensor | None) -> Tensor:
        """Those in an object's bag."""
        check_labels(targets, self.num_classes)
        anchors = torch.cat(self.level_anchors(raw))
        everywhere = torch.arange(len(anchors), device=anchors.device)
        positive = torch.zeros(len(targets), len(anchors), dtype=torch.bool, device=anchors.device)
        for image, target in enumerate(targets):
            here = everywhere if trained is None else trained[image].nonzero()[:, 0]
            if len(target.boxes):
                positive[image, here[self._bag(target.boxes.to(anchors), anchors[here]).flatten()]] = True
        return positive

    def _bag(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """(N, size) indices of the anchors that overlap each box most."""
        size = min(self.bag_size, len(anchors))
        return torch.cat([box_iou(part, anchors).topk(size, 1)[1] for part in chunks_of(boxes, len(anchors))])

    def _bags(self, logits: Tensor, deltas: Tensor, anchors: Tensor, target: Target) -> Tensor:
        """(N,) -alpha log of how likely each box's bag finds it."""
        boxes = target.boxes.to(anchors)
        if not len(boxes):
            return logits.new_zeros(0)
        bag = self._bag(boxes, anchors)
        wanted = self.coder.encode(anchors[bag], boxes[:, None])
        away = F.smooth_l1_loss(deltas[bag], wanted, reduction="none", beta=self.beta).sum(-1)
        # In logarithms: far-off boxes have a likelihood of 0 in float32, but a gradient.
        likely = F.logsigmoid(logits[bag, target.labels[:, None]]) - self.box_weight * away
        weight = (1 / (1 - likely.exp()).clamp(min=_EPS)).log().log_softmax(1)
        return -self.alpha * torch.logsumexp(weight + likely, 1)

    def _background(self, logits: Tensor, deltas: Tensor, anchors: Tensor, target: Target) -> Tensor:
        """Focal loss of an image's anchors as background, as far as they are; scalar."""
        with torch.no_grad():
            is_object = torch.zeros_like(logits)
            if len(target.boxes):
                decoded = self.coder.decode(anchors, deltas)
                start = 0
                for part in chunks_of(target.boxes.to(anchors), len(anchors)):
                    overlap = box_iou(part, decoded)
                    best = overlap.amax(1, keepdim=True).clamp(min=self.threshold + _EPS)
                    degree = ((overlap - self.threshold) / (best - self.threshold).clamp(min=_EPS)).clamp(0, 1)
                    labels = target.labels[start : start + len(part)]
                    is_object.scatter_reduce_(1, labels.expand(len(anchors), -1), degree.T, "amax")
                    start += len(part)
        chance = (logits.sigmoid() * (1 - is_object)).clamp(_EPS, 1 - 1e-7)  # below 1 in float32
        each = chance**self.gamma * -torch.log1p(-chance)
        return (1 - self.alpha) * each.sum()
