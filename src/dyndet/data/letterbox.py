"""Fitting images to a square with their aspect ratio kept: resize, then a border of constant colour."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Generator

from dyndet.data.transforms import resize, shortest_edge_size
from dyndet.errors import UserError
from dyndet.structures import Sample, Size

FILL = 114
"""Grey of borders and gaps, 0..255."""


class Letterbox:
    """Resizes the longer side to `size` and adds a border up to a square, which becomes part of the image.

    The border surrounds the image, an odd pixel at the bottom or right. Boxes and masks move along. Detections on the
    result are not in pixels that `target.original_size` could scale back, so this is for training.

    Args:
        size: the longer side in pixels.
        fill: grey of the border, 0..255.

    Raises:
        UserError: if an argument is out of range.
    """

    def __init__(self, size: int, *, fill: int = FILL) -> None:
        if size < 1 or not 0 <= fill <= 255:
            raise UserError(f"size ({size}) must be at least 1, fill ({fill}) must lie in 0..255")
        self.size = size
        self.fill = fill

    def __call__(self, sample: Sample, generator: Generator) -> Sample:
        return pad(resize_longest(sample, self.size), (self.size, self.size), fill=self.fill)


def resize_longest(sample: Sample, size: int) -> Sample:
    """The longer side becomes `size` pixels; the other one is rounded."""
    height, width = sample.image.shape[-2:]
    return resize(sample, shortest_edge_size((height, width), size, size))


def pad(sample: Sample, canvas: Size, *, fill: int = FILL) -> Sample:
    """The sample in the middle of a larger canvas (H, W)."""
    height, width = sample.image.shape[-2:]
    down, right = canvas[0] - height, canvas[1] - width
    if not down and not right:
        return sample
    top, left = down // 2, right // 2
    border = (left, right - left, top, down - top)
    target = sample.target
    masks = None if target.masks is None else F.pad(target.masks, border)
    boxes = target.boxes + torch.tensor([left, top] * 2, dtype=target.boxes.dtype)
    target = replace(target, boxes=boxes, masks=masks, segmentations=None, truth=None)
    return Sample(F.pad(sample.image, border, value=fill), target)
