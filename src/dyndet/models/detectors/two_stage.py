"""A two-stage detector: backbone -> neck -> head -> proposals -> what each of them holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from dyndet.models.backbones.timm import TimmBackbone
from dyndet.models.budget import Budget
from dyndet.models.detectors.base import Branch, FeatureMaps, Head, Images, RawMaps
from dyndet.models.detectors.pyramid import Outputs, PyramidDetector, fitted
from dyndet.models.heads.branches import with_branches
from dyndet.models.heads.none import NoHead
from dyndet.models.necks.fpn import FPN
from dyndet.models.preprocess import Preprocess
from dyndet.models.two_stage.mask import MaskRCNN, paste_masks
from dyndet.models.two_stage.roi import RoIPredictor
from dyndet.models.two_stage.rpn import RPN
from dyndet.structures import Detections, HeadOutput, ImageBatch, Size, Target


class TwoStageDetector(PyramidDetector):
    """Any head between any pyramid and an RPN with its second stage (Faster, Cascade, Mask R-CNN).

    Args:
        preprocess: pixels to network input.
        backbone: images -> feature maps; has `channels` and `strides`.
        neck: feature maps -> pyramid; has `channels` and `strides`.
        head: (pyramid, valid) -> `HeadOutput`, whose `cls` both stages read; None leaves the pyramid as it is.
        rpn: features -> proposals.
        predictor: features and proposals -> losses, detections.
        budget: prices the head's routing in `losses`; None leaves it free.
        precision: see `PyramidDetector`; "predictor" covers both stages.

    Attributes:
        reads: what of a `HeadOutput` the stages are given.
    """

    reads: tuple[Branch, ...] = ("cls",)
    predictor: RoIPredictor

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        backbone: FeatureMaps,
        neck: FeatureMaps,
        head: Head | None = None,
        rpn: RPN,
        predictor: RoIPredictor,
        budget: Budget | None = None,
        precision: Mapping[str, str | None] | None = None,
    ) -> None:
        super().__init__(
            preprocess=preprocess,
            backbone=backbone,
            neck=neck,
            head=NoHead() if head is None else head,
            budget=budget,
            precision=precision,
        )
        if preprocess.centred:
            raise ValueError("a two-stage detector reads images at the top left: set preprocess.centred=false")
        self.rpn = rpn
        self.predictor = predictor

    @property
    def has_masks(self) -> bool:
        return isinstance(self.predictor, MaskRCNN)

    def forward(self, images: Images, maps: Sequence[Tensor] | None = None) -> RawMaps:
        """`raw_outputs`; then the second stage on as many regions as the RPN may propose, and masks of as many as may
        be found.
        """
        outputs = self._forward(images, maps)
        features, stage = outputs.head.cls[0], self.predictor
        self.run_part("predictor", stage, _regions(features, self.rpn.max_proposals, stage.size))
        if isinstance(stage, MaskRCNN):
            self.run_part("predictor", stage.mask_head, _regions(features, stage.max_detections, stage.mask_pool.size))
        return outputs.raw

    def parts(self) -> dict[str, nn.Module]:
        """As of `Detector`: "backbone", "neck", "head", "rpn", "roi" and, where there are masks, "mask"."""
        parts = super().parts()
        parts["roi"] = parts.pop("predictor")
        return parts | ({"mask": self.predictor.mask_head} if isinstance(self.predictor, MaskRCNN) else {})

    def _raw(self, head: HeadOutput) -> RawMaps:
        """Per level what the RPN says: `objectness` (B, A, H, W) logits and `deltas` (B, 4A, H, W)."""
        return self.run_part("predictor", self.rpn, head.cls)

    def _wanted(self, batch: ImageBatch, targets: Sequence[Target | dict[str, Tensor]]) -> list[Target]:
        """Without boxes that have no area, too: they have no deltas."""
        return [_solid(target) for target in super()._wanted(batch, targets)]

    def _terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """`rpn_cls`, `rpn_box`, `cls`, `box`; `mask` where there are masks."""
        sizes, features, targets = _sizes(outputs.batch), outputs.head.cls, outputs.targets
        terms = self.rpn.losses(outputs.raw, targets, outputs.valid)
        samples = self.predictor.sample(self.rpn.proposals(outputs.raw, sizes, outputs.valid), targets)
        return terms | self.run_part("predictor", self.predictor.losses, features, samples, targets, sizes)

    def _detections(self, outputs: Outputs) -> list[Detections]:
        sizes, features = _sizes(outputs.batch), outputs.head.cls
        proposals = self.rpn.proposals(outputs.raw, sizes, outputs.existing(self.rpn))
        found = self.run_part("predictor", self.predictor.detections, features, proposals, sizes)
        return _in_original_pixels(found, outputs.batch)


def _sizes(batch: ImageBatch) -> list[Size]:
    return [(height, width) for height, width in batch.sizes.tolist()]


def _solid(target: Target) -> Target:
    solid = (target.boxes[:, 2:] > target.boxes[:, :2]).all(1)
    return target if bool(solid.all()) else target[solid]


def _regions(features: Tensor, count: int, size: int) -> Tensor:
    """Stands for pooled features of so many regions per image."""
    return features.new_zeros(count * len(features), features.shape[1], size, size)


def _in_original_pixels(found: Sequence[Detections], images: ImageBatch) -> list[Detections]:
    ratios = (images.original_sizes / images.sizes).flip(1).repeat(1, 2)  # width, height, width, height
    moved = []
    for item, ratio, (height, width) in zip(found, ratios, images.original_sizes.tolist(), strict=True):
        boxes = item.boxes * ratio.to(item.boxes)
        masks = None if item.masks is None else paste_masks(item.masks, boxes, (height, width))
        moved.append(replace(item, boxes=boxes, masks=masks))
    return moved


def assemble_two_stage(
    *,
    preprocess: Preprocess,
    backbone: TimmBackbone,
    neck: Callable[..., FPN],
    head: Callable[..., Head],
    rpn: Callable[..., RPN],
    predictor: Callable[..., RoIPredictor],
    budget: Budget | None = None,
    precision: Mapping[str, str | None] | None = None,
) -> TwoStageDetector:
    """Builds a `TwoStageDetector` from parts that wait for the widths and strides of the part before them.

    Args:
        preprocess: ready.
        backbone: ready.
        neck: called with `in_channels` and `in_strides`.
        head: called with `channels` and `branches`.
        rpn: called with `channels` and `strides`.
        predictor: called with `channels` and `strides`.
        budget: see `TwoStageDetector`.
        precision: see `TwoStageDetector`.

    Raises:
        UserError: on a head or a predictor that does not fit the neck.
    """
    pyramid = neck(in_channels=backbone.channels, in_strides=backbone.strides)
    return TwoStageDetector(
        preprocess=preprocess,
        backbone=backbone,
        neck=pyramid,
        head=fitted(with_branches(head, TwoStageDetector.reads), "head", pyramid),
        rpn=fitted(rpn, "predictor", pyramid, strides=pyramid.strides),
        predictor=fitted(predictor, "predictor", pyramid, strides=pyramid.strides),
        budget=budget,
        precision=precision,
    )
