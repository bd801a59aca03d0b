"""Geometry of samples: pure callables `(sample, generator) -> sample`.

All randomness comes from the generator that is handed in, so a sample depends on its key and nothing else. Images stay
uint8; `target.original_size` always tells the size on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Generator, Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from dyndet.errors import UserError
from dyndet.structures import Sample, Size

Transform = Callable[[Sample, Generator], Sample]


class Compose:
    """One transform after the other."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = list(transforms)

    def __call__(self, sample: Sample, generator: Generator) -> Sample:
        for transform in self.transforms:
            sample = transform(sample, generator)
        return sample


class Resize:
    """Resizes to one size; the aspect ratio is not kept.

    Args:
        size: (H, W), or one number for a square.
    """

    def __init__(self, size: Size | int) -> None:
        height, width = (size, size) if isinstance(size, int) else size
        if min(height, width) < 1:
            raise UserError(f"cannot resize to {height} x {width}: both sides must be at least 1 pixel")
        self.size: Size = (int(height), int(width))

    def __call__(self, sample: Sample, generator: Generator) -> Sample:
        return resize(sample, self.size)


class ResizeShortestEdge:
    """Resizes so that the shorter side is `short`, unless the longer one would exceed `max_size`.

    Args:
        short: the shorter side in pixels; one is drawn per image when several are given (multi-scale training).
        max_size: limit of the longer side in pixels.
    """

    def __init__(self, short: int | Sequence[int], max_size: int) -> None:
        self.short = (short,) if isinstance(short, int) else tuple(int(side) for side in short)
        self.max_size = max_size
        if not self.short or min(*self.short, max_size) < 1:
            raise UserError(
                f"short ({short}) and max_size ({max_size}), which data.size sets, must be at least 1 pixel"
            )

    def __call__(self, sample: Sample, generator: Generator) -> Sample:
        pick = int(torch.randint(len(self.short), (), generator=generator)) if len(self.short) > 1 else 0
        height, width = sample.image.shape[-2:]
        return resize(sample, shortest_edge_size((height, width), self.short[pick], self.max_size))


def resizing(short: int | Sequence[int], max_size: int, *, size: Size | int | None = None) -> Transform:
    """How images come to the size that a detector sees.

    Args:
        short: as of `ResizeShortestEdge`.
        max_size: the same.
        size: where given, decides alone: one number is the shorter side (the longer one is at most 5/3 of it), (H, W)
            is the exact size, whatever the aspect ratio.
    """
    if size is None:
        return ResizeShortestEdge(short, max_size)
    if isinstance(size, bool | float | str):
        raise UserError(f"data.size must be a whole number of pixels or [H,W], got {size!r}")
    if isinstance(size, int):
        return ResizeShortestEdge(size, size * 5 // 3)
    sides = [int(side) for side in size]
    if len(sides) != 2:
        raise UserError(f"data.size must be one number (short edge) or [H,W], got {sides}")
    return Resize((sides[0], sides[1]))


class RandomHorizontalFlip:
    """Mirrors left and right with probability `p`."""

    def __init__(self, p: float = 0.5) -> None:
        if not 0 <= p <= 1:
            raise UserError(f"the probability of a flip must lie in 0..1, not {p}")
        self.p = p

    def __call__(self, sample: Sample, generator: Generator) -> Sample:
        return flip(sample) if chance(self.p, generator) else sample


class DropMasks:
    """Leaves boxes only, once masks have served: they make batches large.

    Args:
        keep: for detectors that learn masks; nothing is dropped.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self.keep = keep

    def __call__(self, sample: Sample, generator: Generator) -> Sample:
        if self.keep:
            return sample
        return replace(sample, target=replace(sample.target, masks=None))


def uniform(low: float, high: float, generator: Generator) -> float:
    """A number from [low, high)."""
    return low + (high - low) * float(torch.rand((), dtype=torch.float64, generator=generator))


def chance(p: float, generator: Generator) -> bool:
    """True with probability `p`."""
    return float(torch.rand((), generator=generator)) < p


def shortest_edge_size(size: Size, short: int, max_size: int) -> Size:
    """The size rule of detectron2 and mmdetection, in exact integers: one scale for both sides, halves round up."""
    shorter, longer = min(size), max(size)
    new, old = (max_size, longer) if short * longer > max_size * shorter else (short, shorter)
    height, width = (max(1, (2 * side * new + old) // (2 * old)) for side in size)
    return height, width


def resize(sample: Sample, size: Size) -> Sample:
    """Image bilinear with antialiasing, masks nearest, boxes by the exact ratios W'/W and H'/H."""
    image, target = sample.image, sample.target
    height, width = image.shape[-2:]
    if (height, width) == size:
        return sample
    ratio = torch.tensor([size[1] / width, size[0] / height] * 2, dtype=torch.float64)
    boxes = (target.boxes * ratio).to(target.boxes.dtype)
    image = tv.resize(image, list(size), InterpolationMode.BILINEAR, antialias=True)
    masks = None if target.masks is None else _resize_masks(target.masks, size)
    return Sample(image, replace(target, boxes=boxes, masks=masks))


def flip(sample: Sample) -> Sample:
    """Left becomes right."""
    target = sample.target
    width = sample.image.shape[-1]
    x1, y1, x2, y2 = target.boxes.unbind(1)
    boxes = torch.stack([width - x2, y1, width - x1, y2], 1)
    masks = None if target.masks is None else tv.horizontal_flip(target.masks)
    target = replace(target, boxes=boxes, masks=masks, segmentations=None, truth=None)
    return Sample(tv.horizontal_flip(sample.image), target)


def _resize_masks(masks: Tensor, size: Size) -> Tensor:
    if not len(masks):
        return masks.new_zeros(0, *size)
    # NEAREST_EXACT samples at pixel centres; NEAREST would shift masks by half a pixel against their boxes.
    return tv.resize(masks.byte(), list(size), InterpolationMode.NEAREST_EXACT).bool()
