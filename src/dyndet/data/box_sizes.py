"""How large the objects of a set are at the input size, and which level ranges and anchors follow from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dyndet.data.dataset import DetectionDataset
from dyndet.data.sampler import keyed_generator
from dyndet.data.transforms import Transform
from dyndet.errors import DataError
from dyndet.models.predictors.anchors import AnchorGrid

SHARES = (2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0)
"""Level ranges in strides: 8 is published, below 2.5 a level would have hardly a point per object."""

SCALES = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0)
"""Sides of anchors in strides."""

NEARLY = 0.03
"""Of mean IoU: anchors that fit as well as the best but for this lie on finer levels, where objects have more places.
In runs of 120 to 160 steps that is worth 0.09 AP and more (RetinaNet on generated sets)."""


def box_shapes(dataset: DetectionDataset, transform: Transform | None, *, images: int = 64) -> Tensor:
    """Width and height of boxes.

    Args:
        dataset: of which so many images are read, spread evenly.
        transform: brings them to the input size.
        images: at most.

    Returns:
        (N, 2) in pixels of the input, crowd left out.
    """
    count = min(images, len(dataset))
    found = [torch.zeros(0, 2)]
    for position in range(count):
        try:
            sample = dataset[position * len(dataset) // count]
        except DataError:  # said when it is trained on
            continue
        if transform is not None:
            sample = transform(sample, keyed_generator(0, position))
        boxes = sample.target.boxes[~sample.target.crowd]
        found.append(boxes[:, 2:] - boxes[:, :2])
    return torch.cat(found)


def reaches(shapes: Tensor) -> Tensor:
    """(N,) half the longer side: about the largest distance that a point at an object's centre regresses."""
    return shapes.amax(1) / 2


def base_range(reach: Tensor, strides: Sequence[int]) -> float:
    """The range of the finest level with which the levels share the objects most evenly (largest entropy).

    Every further level reaches twice as far, the last one without end. Without objects it is the published 8 strides.

    Args:
        reach: (N,) of `reaches`.
        strides: of the levels, finest first.
    """
    candidates = [share * strides[0] for share in reversed(SHARES)]
    if not len(reach) or len(strides) < 2:
        return candidates[0]

    def evenness(base: float) -> float:
        borders = torch.tensor([base * 2.0**level for level in range(len(strides) - 1)])
        shares = torch.bucketize(reach, borders).bincount(minlength=len(strides)) / len(reach)
        return float(torch.special.entr(shares).sum())

    return max(candidates, key=evenness)


def anchor_scale(shapes: Tensor, strides: Sequence[int], *, per_octave: int, ratios: Sequence[float]) -> float:
    """The smallest side of anchors, in strides: the largest one with which boxes find nearly the best anchors.

    How well they do is the mean of their best IoU. Levels have anchors scale * stride * 2^(i / per_octave) of every
    ratio. Without objects it is RetinaNet's 4 for whole octaves and 8 for single sizes.

    Args:
        shapes: (N, 2) of `box_shapes`.
        strides: of the levels.
        per_octave: sizes per level.
        ratios: height / width.
    """
    if not len(shapes):
        return 8.0 if per_octave == 1 else 4.0

    def fit(scale: float) -> float:
        grid = AnchorGrid.octaves(base=scale, per_octave=per_octave, ratios=ratios).shapes()
        return float(shape_iou(shapes, torch.cat([grid * stride for stride in strides])).amax(1).mean())

    fits = {scale: fit(scale) for scale in SCALES}
    return max(scale for scale, value in fits.items() if value >= max(fits.values()) - NEARLY)


def clustered_anchors(shapes: Tensor, levels: int, each: int = 3, *, rounds: int = 100) -> list[list[list[float]]]:
    """(levels, each, 2) widths and heights that stand for all boxes: k-means of their logarithms, from small to large.

    Args:
        shapes: (N, 2) of `box_shapes`.
        levels: of the pyramid, finest first.
        each: anchors per level.
        rounds: of k-means at most.

    Raises:
        DataError: if there are fewer boxes of different shape than anchors.
    """
    points = shapes.clamp(min=1).log().unique(dim=0).double()
    number = levels * each
    if len(points) < number:
        raise DataError(
            f"{len(points)} boxes of different shape for {number} anchors: give predictor.anchors as lists of [w, h]"
        )
    points = points[points.sum(1).argsort(stable=True)]
    centres = points[torch.linspace(0, len(points) - 1, number).round().long()]
    for _ in range(rounds):
        nearest = torch.cdist(points, centres).argmin(1)
        moved = torch.stack(
            [points[nearest == k].mean(0) if (nearest == k).any() else centres[k] for k in range(number)]
        )
        if torch.equal(moved, centres):
            break
        centres = moved
    sides = centres[centres.sum(1).argsort(stable=True)].exp()
    return [[[round(value, 1) for value in pair] for pair in level] for level in sides.view(levels, each, 2).tolist()]


def shape_iou(shapes: Tensor, others: Tensor) -> Tensor:
    """(N, 2) and (M, 2) widths and heights -> (N, M) IoU of boxes that share their centre."""
    common = torch.minimum(shapes[:, None], others).prod(-1)
    return common / (shapes.prod(1)[:, None] + others.prod(1) - common).clamp(min=1e-9)
