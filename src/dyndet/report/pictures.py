"""Validation images with what was right and wrong on them, for a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from dyndet.data.images import read_image
from dyndet.errors import DataError
from dyndet.report.style import Color, to_picture
from dyndet.structures import Target

RIGHT, WRONG, MISSED, ANNOTATED = (43, 108, 176), (214, 39, 40), (245, 166, 35), (255, 255, 255)
"""Colours of detections that are right or wrong, of objects that were missed, and of others as annotated."""

Outline = tuple[Sequence[float], Color]
"""A box, xyxy in pixels of the image on disk, and its colour."""


def read_picture(target: Target, folder: str | Path | None = None) -> Image.Image | None:
    """The image of a target; None if its file is gone.

    Args:
        target: with a path.
        folder: where the file may lie by its name, when it is not at its path.
    """
    paths = [Path(target.path)] if target.path else []
    if paths and folder is not None:
        paths.append(Path(folder) / paths[0].name)
    for path in paths:
        try:
            return to_picture(read_image(path))
        except DataError:
            continue
    return None


def outlined(image: Image.Image, target: Target, outlines: Iterable[Outline], *, width: int = 280) -> Image.Image:
    """The whole image with boxes on it, as large as a square of `width` allows."""
    height, across = target.original_size
    return _drawn(image, (0, 0, across, height), target, outlines, width)


def close_up(
    image: Image.Image, target: Target, box: Sequence[float], outlines: Iterable[Outline], *, width: int = 240
) -> Image.Image:
    """A square around a box, at least a third of the image, with boxes on it."""
    height, across = target.original_size
    left, top, right, bottom = box
    side = min(max(2.2 * (right - left), 2.2 * (bottom - top), max(height, across) / 3), max(height, across))
    x = _inside((left + right - side) / 2, side, across)
    y = _inside((top + bottom - side) / 2, side, height)
    window = (max(0.0, x), max(0.0, y), min(across, x + side), min(height, y + side))
    return _drawn(image, window, target, outlines, width)


def boxes_of(target: Target, keep: Iterable[int], color: Color) -> list[Outline]:
    """Outlines of some objects."""
    boxes = target.boxes.tolist()
    return [(boxes[index], color) for index in keep]


def _drawn(
    image: Image.Image,
    window: tuple[float, float, float, float],
    target: Target,
    outlines: Iterable[Outline],
    width: int,
) -> Image.Image:
    """The part of the image in a window, in pixels of the annotations, enlarged or made smaller to fit a square."""
    height, across = target.original_size
    left, top, right, bottom = window
    scale = width / max(right - left, bottom - top, 1)
    size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    factors = (image.width / across, image.height / height)  # a file may be larger or smaller than annotated
    part = (left * factors[0], top * factors[1], right * factors[0], bottom * factors[1])
    picture = image.convert("RGB").resize(size, Image.Resampling.BICUBIC, box=part)
    pen = ImageDraw.Draw(picture)
    shift = torch.tensor([left, top, left, top])
    for box, color in outlines:
        x1, y1, x2, y2 = ((torch.tensor(box) - shift) * scale).round().int().tolist()
        corners = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))
        grown = (corners[0] - 1, corners[1] - 1, corners[2] + 1, corners[3] + 1)
        pen.rectangle(grown, outline=(20, 20, 26), width=1)  # a dark rim, so that it shows on any image
        pen.rectangle(corners, outline=color, width=2 if color == ANNOTATED else 3)
    return picture


def _inside(start: float, side: float, length: float) -> float:
    """Moves a span of `side` so that as much of it as possible lies in 0..length."""
    return min(max(0.0, start), max(0.0, length - side))
