"""A one-stage detector: backbone -> neck -> head -> predictor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from dyndet.errors import UserError
from dyndet.models.backbones.timm import TimmBackbone
from dyndet.models.budget import Budget
from dyndet.models.detectors.base import FeatureMaps, Head, Predictor, RawMaps
from dyndet.models.detectors.pyramid import Outputs, PyramidDetector, fitted
from dyndet.models.heads.branches import reads_of, with_branches
from dyndet.models.necks.fpn import FPN
from dyndet.models.preprocess import Preprocess
from dyndet.structures import Detections, HeadOutput


class DenseDetector(PyramidDetector):
    """Any head between any pyramid and any dense predictor.

    Args:
        preprocess: pixels to network input.
        backbone: images -> feature maps; has `channels` and `strides`.
        neck: feature maps -> pyramid; has `channels` and `strides`.
        head: (pyramid, valid) -> `HeadOutput`.
        predictor: `HeadOutput` -> raw maps, losses, detections.
        budget: prices the head's routing in `losses`; None leaves it free.
        precision: see `PyramidDetector`.
    """

    predictor: Predictor

    def __init__(
        self,
        *,
        preprocess: Preprocess,
        backbone: FeatureMaps,
        neck: FeatureMaps,
        head: Head,
        predictor: Predictor,
        budget: Budget | None = None,
        precision: Mapping[str, str | None] | None = None,
    ) -> None:
        super().__init__(
            preprocess=preprocess, backbone=backbone, neck=neck, head=head, budget=budget, precision=precision
        )
        self.predictor = predictor

    def _raw(self, head: HeadOutput) -> RawMaps:
        return self.run_part("predictor", self.predictor, head)

    def _terms(self, outputs: Outputs) -> dict[str, Tensor]:
        return self.predictor.losses(outputs.raw, outputs.targets, outputs.valid)

    def _positives(self, outputs: Outputs) -> Callable[[], Tensor] | None:
        shares = getattr(self.predictor, "positive_shares", None)
        return shares and partial(shares, outputs.raw, outputs.targets, outputs.valid)

    def _detections(self, outputs: Outputs) -> list[Detections]:
        return self.predictor.detections(outputs.raw, outputs.batch, outputs.existing(self.predictor))


def assemble_dense(
    *,
    preprocess: Preprocess,
    backbone: TimmBackbone,
    neck: Callable[..., FPN],
    head: Callable[..., Head],
    predictor: Callable[..., Predictor],
    budget: Budget | None = None,
    precision: Mapping[str, str | None] | None = None,
) -> DenseDetector:
    """Builds a `DenseDetector` from parts that wait for the widths and strides of the part before them.

    Args:
        preprocess: ready.
        backbone: ready.
        neck: called with `in_channels` and `in_strides`.
        head: called with `channels`, and with `branches` where the predictor does not read all.
        predictor: called with `channels` and `strides`.
        budget: see `DenseDetector`.
        precision: see `DenseDetector`.

    Raises:
        UserError: on a predictor that is no single part, and on a head or a predictor that does not fit the neck.
    """
    if not callable(predictor):
        raise UserError("this predictor has two stages: set detector=two_stage, or a dense predictor such as fcos")
    pyramid = neck(in_channels=backbone.channels, in_strides=backbone.strides)
    return DenseDetector(
        preprocess=preprocess,
        backbone=backbone,
        neck=pyramid,
        head=fitted(with_branches(head, reads_of(predictor)), "head", pyramid),
        predictor=fitted(predictor, "predictor", pyramid, strides=pyramid.strides),
        budget=budget,
        precision=precision,
    )
