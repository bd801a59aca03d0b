"""Fitting images to a canvas with their aspect ratio kept: resize, then a border of constant colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from math import ceil

import torch
import torch.nn.functional as F
from torch import Generator

from dyndet.data.transforms import resize, shortest_edge_size
from dyndet.errors import UserError
from dyndet.structures import Sample, Size

FILL = 114
"""Grey of borders and gaps, 0..255."""


class Letterbox:
    """Resizes the longer side to `size` and adds a border, which becomes part of the image.

    Boxes and masks move along. Detections on the result are not in pixels that `target.original_size` could scale
    back, so this is for training.

    Args:
        size: the longer side in pixels.
        stride: None gives a square of `size`; a number only as much border as makes both sides multiples of it.
        centre: the border surrounds the image, an odd pixel at the bottom or right; otherwise all is there.
        enlarge: smaller images grow to `size`, too.
        fill: grey of the border, 0..255.

    Raises:
        UserError: if an argument is out of range.
    """

    def __init__(
        self, size: int, *, stride: int | None = None, centre: bool = True, enlarge: bool = True, fill: int = FILL
    ) -> None:
        if size < 1 or (stride is not None and stride < 1) or not 0 <= fill <= 255:
            raise UserError(f"size ({size}) and stride ({stride}) must be at least 1, fill ({fill}) must lie in 0..255")
        self.size = size
        self.stride = stride
        self.centre = centre
        self.enlarge = enlarge
        self.fill = fill

    def __call__(self, sample: Sample, generator: Generator) -> Sample:
        if self.enlarge or max(sample.image.shape[-2:]) > self.size:
            sample = resize_longest(sample, self.size)
        height, width = sample.image.shape[-2:]
        canvas = (self.size, self.size)
        if self.stride is not None:
            canvas = (-height % self.stride + height, -width % self.stride + width)
        return pad(sample, canvas, centre=self.centre, fill=self.fill)


def resize_longest(sample: Sample, size: int) -> Sample:
    """The longer side becomes `size` pixels; the other one is rounded."""
    height, width = sample.image.shape[-2:]
    return resize(sample, shortest_edge_size((height, width), size, size))


def pad(sample: Sample, canvas: Size, *, centre: bool = True, fill: int = FILL) -> Sample:
    """The sample on a larger canvas (H, W)."""
    height, width = sample.image.shape[-2:]
    down, right = canvas[0] - height, canvas[1] - width
    if not down and not right:
        return sample
    top, left = (down // 2, right // 2) if centre else (0, 0)
    border = (left, right - left, top, down - top)
    target = sample.target
    masks = None if target.masks is None else F.pad(target.masks, border)
    boxes = target.boxes + torch.tensor([left, top] * 2, dtype=target.boxes.dtype)
    return Sample(F.pad(sample.image, border, value=fill), replace(target, boxes=boxes, masks=masks))


def rectangular_shape(sizes: Sequence[Size], size: int, stride: int, extra: float = 0.5) -> Size:
    """The canvas on which YOLO-style evaluation lays out a batch: near the images' shape, a little larger.

    Per side, ceil(aspect * size / stride + extra) * stride, where `aspect` is the side's share of the image's longer
    side, the largest of the batch. Images of similar aspect ratio should share a batch. With `extra` 0.5 the longer
    side exceeds `size` wherever `size` is a multiple of the stride: images of 640 land on 672.

    Args:
        sizes: (H, W) of the images of the batch, at any scale.
        size: pixels of the longer side, to which every image will be resized.
        stride: the detector's largest.
        extra: border in strides, before rounding up.
    """

    def length(side: int) -> int:
        aspect = max(Fraction(shape[side], max(shape)) for shape in sizes)
        return ceil(aspect * size / stride + Fraction(extra)) * stride

    return length(0), length(1)
