"""MixUp: two images shine through each other."""

from __future__ import annotations

import torch
from torch import Generator

from dyndet.data.mosaic import merge
from dyndet.data.sampler import Indexable, Mix
from dyndet.data.transforms import chance
from dyndet.errors import UserError
from dyndet.structures import Sample


class MixUp:
    """Blends a sample with a second one, drawn alike from a random image; the objects of both count in full.

    The share of the first is drawn from Beta(c, c) (Zhang et al., "mixup", ICLR 2018).

    Args:
        base: what makes one sample, all of one size: a `Mosaic`.
        p: share of samples that are blended.
        concentration: c, a whole number; the larger, the closer to one half.

    Raises:
        UserError: if an argument is out of range, or two samples differ in size.
    """

    def __init__(self, base: Mix, *, p: float = 0.15, concentration: int = 8) -> None:
        if not 0 <= p <= 1 or concentration < 1:
            raise UserError(f"p ({p}) must lie in 0..1 and concentration ({concentration}) must be at least 1")
        self.base = base
        self.p = p
        self.concentration = concentration

    def __call__(self, dataset: Indexable[Sample], index: int, generator: Generator) -> Sample:
        first = self.base(dataset, index, generator)
        if not chance(self.p, generator):
            return first
        other = int(torch.randint(len(dataset), (), generator=generator))
        return blend(first, self.base(dataset, other, generator), self._share(generator))

    def _share(self, generator: Generator) -> float:
        # The median of 2c - 1 uniform numbers has the distribution Beta(c, c).
        return float(torch.rand(2 * self.concentration - 1, generator=generator).median())


def blend(first: Sample, second: Sample, share: float) -> Sample:
    """`share` of the first image, the rest of the second, and the objects of both.

    Raises:
        UserError: if the images differ in size.
    """
    if first.image.shape != second.image.shape:
        sizes = " and ".join(str(tuple(sample.image.shape[-2:])) for sample in (first, second))
        raise UserError(f"mixup needs images of one size, but got {sizes} (H, W): put it around a mosaic")
    image = torch.lerp(second.image.float(), first.image.float(), share).add_(0.5).to(torch.uint8)
    return Sample(image, merge([first.target, second.target], (image.shape[-2], image.shape[-1])))
