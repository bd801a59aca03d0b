"""Checks of boxes against the detector that is to find them, in the pixels that it sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dyndet.checkup.finding import Finding, Severity
from dyndet.checkup.split import Split
from dyndet.data.transforms import Transform
from dyndet.models.detectors.base import Detector
from dyndet.models.predictors.fcos import FCOS
from dyndet.models.predictors.fcos_assign import CenterSampling
from dyndet.ops.grid import level_points
from dyndet.structures import Sample, Size, Target

MOST_IMAGES = 500
"""So many of a split are assigned, evenly spread."""


@dataclass(frozen=True)
class Shares:
    """How the boxes of a split fall to the levels of a detector.

    Attributes:
        strides: of the levels, in pixels.
        boxes: how many of them have points at each level; a box may have them at several.
        lost: boxes without a point at any.
        total: boxes that were looked at.
    """

    strides: tuple[int, ...]
    boxes: tuple[int, ...]
    lost: int
    total: int


def seen_boxes(split: Split, transform: Transform) -> list[tuple[Size, Tensor]]:
    """H, W of images as a network sees them and their (N, 4) boxes there, of `MOST_IMAGES` evenly spread ones."""
    chosen = min(len(split), MOST_IMAGES)
    return [_seen(split, transform, position * len(split) // chosen) for position in range(chosen)]


def check_sizes(split: Split, seen: Sequence[tuple[Size, Tensor]], strides: Sequence[int]) -> list[Finding]:
    """Boxes that are small for the finest level.

    Args:
        split: that they lie in.
        seen: its images, see `seen_boxes`.
        strides: of the detector's levels.
    """
    sides = torch.cat([(boxes[:, 2:] - boxes[:, :2]).amin(1) for _, boxes in seen])
    small = int((sides < strides[0]).sum())
    if not small:
        return []
    share = small / len(sides)
    severity: Severity = "warning" if share > 0.1 else "note"
    return [
        Finding(
            "boxes below a stride",
            severity,
            f"{split.name}: {small} of {len(sides)} boxes ({share:.1%}) are thinner in the network's input than the "
            f"{strides[0]} pixels of the finest level",
            small,
            "a larger input (data.size) or a finer level finds them",
        )
    ]


def share_levels(seen: Sequence[tuple[Size, Tensor]], detector: Detector) -> Shares | None:
    """Which boxes get points at which level; None for predictors that do not assign by sizes."""
    predictor = getattr(detector, "predictor", None)
    if not isinstance(predictor, FCOS):
        return None
    strides = tuple(detector.strides)
    counts, lost, total = torch.zeros(len(strides), dtype=torch.int64), 0, 0
    for size, boxes in seen:
        reached = _reached(predictor.assigner, predictor.point_offset, strides, size, boxes)
        counts += reached.sum(0)
        lost += int((~reached.any(1)).sum())
        total += len(boxes)
    return Shares(strides, tuple(counts.tolist()), lost, total)


def check_levels(split: Split, shares: Shares) -> list[Finding]:
    """Boxes that no point answers for, and levels that answer for none."""
    findings = []
    if shares.lost:
        share = shares.lost / shares.total
        severity: Severity = "error" if share > 0.3 else "warning" if share > 0.02 else "note"
        findings.append(
            Finding(
                "boxes without a point",
                severity,
                f"{split.name}: {shares.lost} of {shares.total} boxes ({share:.1%}) belong to no point of any level: "
                "they are never learned",
                shares.lost,
                "a larger data.size, or level ranges that fit (predictor.assigner.base_range)",
            )
        )
    idle = [f"stride {stride}" for stride, count in zip(shares.strides, shares.boxes, strict=True) if not count]
    if idle and shares.total:
        findings.append(
            Finding(
                "idle levels",
                "note",
                f"{split.name}: no box belongs to {', '.join(idle)}",
                len(idle),
                "level ranges that fit the boxes (predictor.assigner.base_range) share the work",
            )
        )
    return findings


def _seen(split: Split, transform: Transform, index: int) -> tuple[Size, Tensor]:
    height, width = split.size(index)
    mine = np.flatnonzero((split.image == index) & ~split.crowd)
    boxes = torch.from_numpy(split.boxes[mine].astype(np.float32))
    target = Target(boxes, torch.from_numpy(split.labels[mine]), torch.zeros(len(mine), dtype=torch.bool))
    blank = torch.zeros(3, 1, 1, dtype=torch.uint8).expand(3, height, width)  # the file is not read
    sample = transform(Sample(blank, target), torch.Generator().manual_seed(0))
    return (sample.image.shape[-2], sample.image.shape[-1]), sample.target.boxes


def _reached(assigner: CenterSampling, offset: float, strides: Sequence[int], size: Size, boxes: Tensor) -> Tensor:
    """(N, L) bool: whether any point of a level answers for a box, each box told apart by a label of its own."""
    shapes = [(-(-size[0] // stride), -(-size[1] // stride)) for stride in strides]
    points = [level_points(shape, stride, offset, boxes.device) for shape, stride in zip(shapes, strides, strict=True)]
    own = Target(boxes, torch.arange(len(boxes)), torch.zeros(len(boxes), dtype=torch.bool))
    labels = assigner(points, strides, own, len(boxes)).labels.split([len(level) for level in points])
    return torch.stack([torch.isin(torch.arange(len(boxes)), found) for found in labels], 1)
