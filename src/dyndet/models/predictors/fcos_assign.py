"""Which ground truth each point of a pyramid answers for (FCOS).

Source: Tian et al., FCOS, ICCV 2019, arXiv:1904.01355, with centre sampling as in the published fine-grained settings
and in the "improved" settings of common implementations, which agree on this part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyndet.structures import Target

_FAR = 1e8


@dataclass(frozen=True)
class PointTargets:
    """Targets of the P points of one image.

    Attributes:
        labels: (P,) int64, K (the number of classes) for background.
        ltrb: (P, 4) float32, distances in pixels to the matched box's left, top, right, bottom; garbage on background.
    """

    labels: Tensor
    ltrb: Tensor


def regress_ranges(num_levels: int, base: float = 64) -> list[tuple[float, float]]:
    """[-1, 64], [64, 128], ... the last one open: how large max(l, t, r, b) may be at each level, in pixels."""
    bounds = [float(base * 2**level) for level in range(num_levels - 1)]
    return list(zip([-1.0, *bounds], [*bounds, _FAR], strict=True))


class CenterSampling:
    """A point belongs to the smallest box it is central to, at the level that fits the box's size.

    Args:
        radius: half width of the central region in strides; None takes the whole box.
        base_range: largest distance that the finest level regresses, in pixels (64 for P3); None takes eight of its
            strides.
        strict: a distance on the border of a range belongs to no level (detectron2) instead of to both.
    """

    def __init__(self, *, radius: float | None = 1.5, base_range: float | None = 64, strict: bool = False) -> None:
        self.radius = radius
        self.base_range = base_range
        self.strict = strict

    def __call__(
        self, points: Sequence[Tensor], strides: Sequence[int], target: Target, num_classes: int
    ) -> PointTargets:
        """Assigns one image.

        Args:
            points: per level (P_l, 2) x, y in pixels.
            strides: per level.
            target: its boxes must be in the same pixels and hold no crowd.
            num_classes: the background label.
        """
        flat = torch.cat(list(points))
        ranges = regress_ranges(len(points), 8 * strides[0] if self.base_range is None else self.base_range)
        low, high, radius = (
            torch.cat([flat.new_full((len(p),), value) for p, value in zip(points, values, strict=True)])[:, None]
            for values in (
                [pair[0] for pair in ranges],
                [pair[1] for pair in ranges],
                [(self.radius or 0.0) * stride for stride in strides],
            )
        )
        boxes = target.boxes.float()
        if not len(boxes):
            labels = torch.full((len(flat),), num_classes, dtype=torch.int64, device=flat.device)
            return PointTargets(labels, flat.new_zeros(len(flat), 4))
        x, y = flat[:, :1], flat[:, 1:]
        # (P, N, 4)
        ltrb = torch.stack([x - boxes[:, 0], y - boxes[:, 1], boxes[:, 2] - x, boxes[:, 3] - y], 2)
        inside = ltrb.amin(2) > 0
        if self.radius is not None:
            centre = (boxes[:, :2] + boxes[:, 2:]) / 2
            inside &= ((x - centre[:, 0]).abs() < radius) & ((y - centre[:, 1]).abs() < radius)
        farthest = ltrb.amax(2)
        fits = (farthest > low) & (farthest < high) if self.strict else (farthest >= low) & (farthest <= high)
        fits = fits & inside
        area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).expand(len(flat), -1)
        smallest, match = area.masked_fill(~fits, torch.inf).min(1)
        labels = target.labels[match].masked_fill(smallest.isinf(), num_classes)
        return PointTargets(labels, ltrb[torch.arange(len(flat), device=flat.device), match])
