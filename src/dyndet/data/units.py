"""Whether boxes are in the unit that their format is in: pixels for 0..1, and the reverse, are told by all of a set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from dyndet.errors import DataError
from dyndet.structures import Size, Truth

_CORNER = 1.5
"""Boxes of 0..1, some of them a little outside, end here."""

_FAR = 2
"""Boxes that leave their image belong to an object that is at least partly seen; no object is twice as far."""

_LEAVING = 0.3
"""Share of boxes that leave their image by its right or lower border: of objects that are cut off it is smaller."""


class Annotated(Protocol):
    """What of a `Record` is looked at."""

    @property
    def size(self) -> Size: ...

    @property
    def sized(self) -> bool: ...

    @property
    def truth(self) -> Truth | None: ...


def check_units(records: Sequence[Annotated], source: str | Path) -> None:
    """Refuses a set that as a whole is in another unit.

    Raises:
        DataError: if all boxes are about as small as a pixel and lie in the top left corner, or, where annotations are
            relative to the size of the image, all end far outside; or if many leave their image, but would all lie in
            it with corners for width and height.
    """
    boxes = [(record.truth.boxes, record) for record in records if record.truth is not None and len(record.truth.boxes)]
    if not boxes:
        return
    count = sum(len(some) for some, _ in boxes)
    if all(_in_corner(some) for some, _ in boxes) and max(max(record.size) for _, record in boxes) > 8:
        raise DataError(
            f"{source}: all {count} boxes lie within 0..1 pixel, so they look normalised: multiply x and width by the "
            "width of their image, y and height by its height"
        )
    if all(not record.sized and _far_outside(some, record.size) for some, record in boxes):
        raise DataError(
            f"{source}: all {count} boxes lie far outside of their images, so they look like pixels where 0..1 is "
            "expected: divide x and width by the width of their image, y and height by its height"
        )
    leaving = sum(int(_leaves(some, record.size).sum()) for some, record in boxes)
    if count >= 5 and leaving > _LEAVING * count and all(_are_corners(some, record.size) for some, record in boxes):
        raise DataError(
            f"{source}: {leaving} of {count} boxes leave their images, and none would as [x1, y1, x2, y2]: write "
            "[x, y, width, height], with x2 - x1 and y2 - y1"
        )


def _in_corner(boxes: np.ndarray) -> bool:
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])
    return bool(((corners > 1 - _CORNER) & (corners < _CORNER)).all())


def _far_outside(boxes: np.ndarray, size: Size) -> bool:
    ends = np.abs(boxes[:, :2] + boxes[:, 2:]) / (size[1], size[0])
    return bool((ends > _FAR).any(1).all())


def _leaves(boxes: np.ndarray, size: Size) -> np.ndarray:
    ends = boxes[:, :2] + boxes[:, 2:]
    return (ends[:, 0] > size[1] + 1) | (ends[:, 1] > size[0] + 1)


def _are_corners(boxes: np.ndarray, size: Size) -> bool:
    """Whether x, y, width, height would be good boxes as x1, y1, x2, y2."""
    low, high = boxes[:, :2], boxes[:, 2:]
    return bool((high > low).all() and (low >= -1).all() and (high <= np.array([size[1], size[0]]) + 1).all())
