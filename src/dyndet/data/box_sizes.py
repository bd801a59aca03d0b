"""How large the objects of a set are at the input size, and which level ranges follow from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dyndet.data.dataset import DetectionDataset
from dyndet.data.sampler import keyed_generator
from dyndet.data.transforms import Transform
from dyndet.errors import DataError

SHARES = (2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0)
"""Level ranges in strides: 8 is published, below 2.5 a level would have hardly a point per object."""


def reaches(dataset: DetectionDataset, transform: Transform | None, *, images: int = 64) -> Tensor:
    """Half the longer side of boxes: about the largest distance that a point at an object's centre regresses.

    Args:
        dataset: of which so many images are read, spread evenly.
        transform: brings them to the input size.
        images: at most.

    Returns:
        (N,) in pixels of the input, crowd left out.
    """
    count = min(images, len(dataset))
    found = [torch.zeros(0)]
    for position in range(count):
        try:
            sample = dataset[position * len(dataset) // count]
        except DataError:  # said when it is trained on
            continue
        if transform is not None:
            sample = transform(sample, keyed_generator(0, position))
        boxes = sample.target.boxes[~sample.target.crowd]
        found.append((boxes[:, 2:] - boxes[:, :2]).amax(1) / 2)
    return torch.cat(found)


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
