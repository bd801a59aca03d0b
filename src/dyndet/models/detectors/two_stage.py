"""A two-stage detector: backbone -> neck -> head -> proposals -> what each of them holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from dyndet.models.backbones.timm import TimmBackbone
from dyndet.models.budget import Budget
from dyndet.models.detectors.base import Branch, FeatureMaps, Head, RawMaps
from dyndet.models.detectors.pyramid import PyramidDetector, fitted
from dyndet.models.heads.branches import with_branches
from dyndet.models.heads.none import NoHead
from dyndet.models.necks.fpn import FPN
from dyndet.models.preprocess import Preprocess
from dyndet.models.two_stage.mask import MaskRCNN, paste_masks
from dyndet.models.two_stage.roi import RoIPredictor
from dyndet.models.two_stage.rpn import RPN
from dyndet.routing import Routing
from dyndet.structures import Detections, HeadOutput, ImageBatch, Losses, Size, Target


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

    def losses_from(
        self, maps: Sequence[Tensor], batch: ImageBatch, targets: Sequence[Target | dict[str, Tensor]]
    ) -> Losses:
        """As of `Detector.losses`: `rpn_cls`, `rpn_box`, `cls`, `box`; `mask` and `budget` where there are such."""
        sizes, output, valid = self._attended(maps, batch)
        wanted = [_trainable(target).to(batch.pixels.device) for target in targets]
        raw = self.run_part("predictor", self.rpn, output.cls)
        terms = self.rpn.losses(raw, wanted, valid)
        samples = self.predictor.sample(self.rpn.proposals(raw, sizes, valid), wanted)
        terms |= self.run_part("predictor", self.predictor.losses, output.cls, samples, wanted, sizes)
        return self._priced(terms, output.routing)

    def detect_from(self, maps: Sequence[Tensor], batch: ImageBatch) -> tuple[list[Detections], Routing | None]:
        sizes, output, valid = self._attended(maps, batch)
        raw = self.run_part("predictor", self.rpn, output.cls)
        proposals = self.rpn.proposals(raw, sizes, valid)
        found = self.run_part("predictor", self.predictor.detections, output.cls, proposals, sizes)
        return _in_original_pixels(found, batch), output.routing

    def raw_from(self, maps: Sequence[Tensor], batch: ImageBatch) -> RawMaps:
        """Per level what the RPN says: `objectness` (B, A, H, W) logits and `deltas` (B, 4A, H, W)."""
        return self.run_part("predictor", self.rpn, self._attended(maps, batch)[1].cls)

    def stages_after(self, maps: Sequence[Tensor], *, head: bool = True) -> Iterator[tuple[str, Callable[[], Any]]]:
        """As of `Detector.stages`: "neck", "head", "rpn", "roi" on as many regions as the RPN may propose, and, where
        there are masks, "mask" on as many as may be found.
        """

        def rpn(output: HeadOutput) -> Tensor:
            self.rpn(output.cls)
            return output.cls[0]

        def roi(features: Tensor) -> Tensor:
            self.predictor(_regions(features, self.rpn.max_proposals, self.predictor.size))
            return features

        parts: list[tuple[str, Callable[[Any], Any]]] = [("rpn", rpn), ("roi", roi)]
        if isinstance(self.predictor, MaskRCNN):
            masks = self.predictor

            def mask(features: Tensor) -> Tensor:
                return masks.mask_head(_regions(features, masks.max_detections, masks.mask_pool.size))

            parts.append(("mask", mask))
        yield from self._stages(maps, head, *parts)

    def _attended(
        self, maps: Sequence[Tensor], batch: ImageBatch
    ) -> tuple[list[Size], HeadOutput, list[Tensor] | None]:
        features, valid = self._features(maps, batch)
        sizes: list[Size] = [(height, width) for height, width in batch.sizes.tolist()]
        return sizes, self.run_head(features, valid), valid


def _trainable(target: Target | dict[str, Tensor]) -> Target:
    """Without crowd, and without boxes that have no area: they have no deltas."""
    target = Target.of(target).without_crowd()
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
