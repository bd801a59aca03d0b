"""What ATSS, RetinaNet and FreeAnchor share: anchors, the last convolutions, and the way back to boxes.

Legend: B images, K classes, A anchors per position, P anchors of all levels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from dyndet.models.detectors.base import Branch, RawMaps
from dyndet.models.heads.init import init_normal
from dyndet.models.predictors.anchors import AnchorGrid, AnchorTargets, BoxCoder
from dyndet.models.predictors.maps import check_labels, flat, last_conv, level_shares, shapes_of, widened
from dyndet.models.predictors.postprocess import Postprocess
from dyndet.structures import Detections, HeadOutput, ImageBatch, Target


class Assigner(Protocol):
    """Which box each anchor of an image answers for."""

    def __call__(
        self, anchors: Sequence[Tensor], target: Target, num_classes: int, valid: Tensor | None = None
    ) -> AnchorTargets: ...


class AnchorPredictor(nn.Module, ABC):
    """A classification and a box convolution over the anchors of every position.

    Args:
        channels: C of the features.
        strides: per level.
        num_classes: K.
        anchors: shapes at every position.
        coder: how boxes are written.
        kernel: of the convolutions, odd.
        separable: they are depthwise-separable (EfficientDet).
        prior: probability at which classification starts.
        postprocess: threshold, top-k and NMS.
        ignore_padding: leave anchors on padding out of losses and detections.
        valid_divisor: with `ignore_padding` off, losses still leave out what lies beyond the image's size rounded up to
            a multiple of this (mmdetection, whose detections may lie there); None keeps everything (detectron2).

    Raises:
        ValueError: on an even kernel.
    """

    reads: tuple[Branch, ...] = ("cls", "reg")
    assigner: Assigner

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        *,
        num_classes: int,
        anchors: AnchorGrid,
        coder: BoxCoder,
        kernel: int,
        separable: bool,
        prior: float,
        postprocess: Postprocess,
        ignore_padding: bool,
        valid_divisor: int | None,
    ) -> None:
        super().__init__()
        self.cls = last_conv(channels, anchors.per_position * num_classes, kernel, separable=separable)
        self.box = last_conv(channels, anchors.per_position * 4, kernel, separable=separable)
        init_normal(self)
        start_at(self.cls, prior)
        self.strides = list(strides)
        self.num_classes = num_classes
        self.anchors = anchors
        self.coder = coder
        self.postprocess = postprocess
        self.ignore_padding = ignore_padding
        self.valid_divisor = valid_divisor

    def forward(self, head: HeadOutput) -> RawMaps:
        """Per level `cls` (B, A*K, H, W) logits and `box` (B, A*4, H, W) deltas."""
        return [{"cls": self.cls(cls), "box": self.box(reg)} for cls, reg in zip(head.cls, head.reg, strict=True)]

    @abstractmethod
    def losses(
        self, raw: RawMaps, targets: Sequence[Target], valid: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Scalar losses by name, in float32.

        Args:
            raw: from `forward`.
            targets: per image, without crowd.
            valid: L x (B, 1, H, W) bool, False on padding.

        Raises:
            ValueError: if a label is not in 0..K-1.
        """

    def detections(self, raw: RawMaps, images: ImageBatch, valid: Sequence[Tensor] | None = None) -> list[Detections]:
        """Detections per image, in pixels of the original images.

        Args:
            raw: from `forward`.
            images: for the valid and the original sizes.
            valid: L x (B, 1, H, W) bool, False on padding.
        """
        masks = self._per_anchor(valid) if valid is not None and self.ignore_padding else [None] * len(raw)
        levels = []
        for level, anchors, mask in zip(raw, self.level_anchors(raw), masks, strict=True):
            probabilities = flat(level["cls"], self.num_classes).sigmoid()
            if mask is not None:
                probabilities = probabilities * mask[..., None]
            boxes = self.coder.decode(anchors, flat(level["box"], 4))
            levels.append((probabilities, self.final_scores(probabilities, level), boxes))
        return self.postprocess(levels, images)

    def final_scores(self, probabilities: Tensor, level: dict[str, Tensor]) -> Tensor:
        """(B, P_l, K) scores of a level's anchors, from their class probabilities and its raw maps."""
        return probabilities

    def level_anchors(self, raw: RawMaps) -> list[Tensor]:
        """Per level (P_l, 4), in pixels."""
        device = raw[0]["cls"].device
        return [self.anchors(shape, stride, device) for shape, stride in zip(shapes_of(raw), self.strides, strict=True)]

    def trained_anchors(self, raw: RawMaps, valid: Sequence[Tensor] | None) -> Tensor | None:
        """(B, P) bool, the anchors that losses see; None for all of them."""
        trained = self._trained(valid)
        return None if trained is None else torch.cat(self._per_anchor(trained), 1)

    @torch.no_grad()
    def positive_shares(self, raw: RawMaps, targets: Sequence[Target], valid: Sequence[Tensor] | None = None) -> Tensor:
        """The (L,) share of every level's positions with an anchor that answers for an object; see `losses`."""
        per_level = [len(level) for level in self.level_anchors(raw)]
        positive = self.positive_anchors(raw, targets, self.trained_anchors(raw, valid)).split(per_level, 1)
        positions = [level.unflatten(1, (-1, self.anchors.per_position)).any(2) for level in positive]
        return level_shares(positions, self._trained(valid))

    def positive_anchors(self, raw: RawMaps, targets: Sequence[Target], trained: Tensor | None) -> Tensor:
        """(B, P) bool, the anchors that answer for objects, by `self.assigner` unless a subclass knows better.

        Args:
            raw: from `forward`.
            targets: per image, without crowd.
            trained: from `trained_anchors`.
        """
        labels = self.match(self.assigner, self.level_anchors(raw), targets, trained).labels
        positive = (labels >= 0) & (labels < self.num_classes)
        return positive if trained is None else positive & trained

    def match(
        self, assigner: Assigner, anchors: Sequence[Tensor], targets: Sequence[Target], trained: Tensor | None
    ) -> AnchorTargets:
        """The assigner's word on every image, stacked: labels (B, P) and boxes (B, P, 4).

        Raises:
            ValueError: if a label is not in 0..K-1.
        """
        check_labels(targets, self.num_classes)
        masks = [None] * len(targets) if trained is None else list(trained)
        each = [assigner(anchors, target, self.num_classes, mask) for target, mask in zip(targets, masks, strict=True)]
        return AnchorTargets(torch.stack([item.labels for item in each]), torch.stack([item.boxes for item in each]))

    def _trained(self, valid: Sequence[Tensor] | None) -> Sequence[Tensor] | None:
        """L x (B, 1, H, W) bool, the positions that losses see; None for all of them."""
        if valid is None or self.ignore_padding:
            return valid
        return None if self.valid_divisor is None else widened(valid, self.strides, self.valid_divisor)

    def _per_anchor(self, valid: Sequence[Tensor]) -> list[Tensor]:
        """Position masks -> per level (B, P_l) of the anchors there."""
        return [mask.flatten(1).repeat_interleave(self.anchors.per_position, 1) for mask in valid]


def start_at(conv: nn.Module, prior: float) -> None:
    """Biases the last layer so that its sigmoid starts at `prior`."""
    last = conv[-1] if isinstance(conv, nn.Sequential) else conv
    if isinstance(last, nn.Conv2d) and last.bias is not None:
        nn.init.constant_(last.bias, -math.log((1 - prior) / prior))
