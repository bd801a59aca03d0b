"""Accuracy against compute of a dynamic detector: what every split of the images between its two routes gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dyndet.metrics.average_precision import CocoMetric
from dyndet.metrics.compute import ComputeMeter
from dyndet.metrics.static import StaticCosts, meter_batch
from dyndet.models.detectors.dynamic import DynamicDetector, Route
from dyndet.structures import Batch, Category, Detections, Target


@dataclass(frozen=True, slots=True)
class Split:
    """One way to divide the images.

    Attributes:
        fraction: share of the images that is hard.
        threshold: of the difficulty logit, above which an image is hard; infinite at the ends.
        macs: mean multiply-adds per image.
        ap: AP over all images.
        ap50: AP50.
    """

    fraction: float
    threshold: float
    macs: float
    ap: float
    ap50: float


@dataclass
class BothWays:
    """What both routes of a dynamic detector gave on the same images.

    Attributes:
        difficulty: (N,) logits.
        first: detections of the easy route, with their `macs`.
        second: of the hard route.
        targets: in pixels of the resized images.
        sizes: (H, W) of these.
        differences: (N,) L1 - L2.
    """

    difficulty: Tensor
    first: Sequence[Detections]
    second: Sequence[Detections]
    targets: Sequence[Target]
    sizes: Tensor
    differences: Tensor

    @classmethod
    def joined(cls, parts: Sequence[BothWays]) -> BothWays:
        """Of several batches."""

        def listed(name: str) -> list[Any]:
            return [item for part in parts for item in getattr(part, name)]

        difficulty, sizes, differences = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("difficulty", "sizes", "differences")
        )
        return cls(difficulty, listed("first"), listed("second"), listed("targets"), sizes, differences)

    def curve(self, categories: Sequence[Category], fractions: Sequence[float]) -> list[Split]:
        """AP and cost when so large a share of the images is hard, the most difficult ones first."""
        return [self._split(categories, fraction) for fraction in fractions]

    def rank_correlation(self) -> float:
        """Spearman's, of difficulty and L1 - L2: 1 when the router knows exactly whom the second detector helps."""
        return spearman(self.difficulty, self.differences)

    def _split(self, categories: Sequence[Category], fraction: float) -> Split:
        threshold = quantile(self.difficulty, fraction)
        hard = (self.difficulty > threshold).tolist()
        chosen = [b if way else a for a, b, way in zip(self.first, self.second, hard, strict=True)]
        metric = CocoMetric(categories, per_class=False)
        metric.sync_on_compute = False  # all images are here
        metric.update(chosen, self.targets, self.sizes)
        scores = metric.compute()
        macs = math.fsum(item.macs or 0.0 for item in chosen) / len(chosen)
        return Split(sum(hard) / len(hard), threshold, macs, scores["AP"], scores["AP50"])


@torch.no_grad()
def go_both_ways(detector: DynamicDetector, static: StaticCosts, batch: Batch) -> BothWays:
    """Runs a batch along both routes; boxes alone are kept of what it finds, as masks of a data set fill the memory.

    Args:
        detector: in eval mode, with a router.
        static: of this detector.
        batch: on its device.
    """

    def along(route: Route) -> list[Detections]:
        detections, routes = detector.detect_by(batch.images, route)
        macs = meter_batch(ComputeMeter(), static, routes, batch.images.sizes.tolist())
        return [replace(item, masks=None, macs=spent).to("cpu") for item, spent in zip(detections, macs, strict=True)]

    seen, losses = detector.image_losses(batch.images, batch.targets)
    difficulty = detector.difficulty(detector.pooled(seen)).cpu()
    targets = [target.without_masks().to("cpu") for target in batch.targets]
    differences = (losses[0] - losses[1]).cpu()
    return BothWays(difficulty, along("first"), along("second"), targets, batch.images.sizes, differences)


def quantile(difficulty: Tensor, fraction: float) -> float:
    """The threshold above which this share of the scores lies, linear between them; the ends take none and all."""
    if fraction <= 0:
        return math.inf
    if fraction >= 1:
        return -math.inf
    return -float(torch.quantile(-difficulty.double(), fraction))


def spearman(x: Tensor, y: Tensor) -> float:
    """Rank correlation of two (N,) tensors; equal values share their mean rank."""
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.norm() * b.norm()))


def _ranks(x: Tensor) -> Tensor:
    _, where, counts = x.double().unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[where]
