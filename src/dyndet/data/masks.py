"""COCO segmentations, polygons or run lengths, to and from bool masks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle
from torch import Tensor

from dyndet.errors import DataError
from dyndet.structures import Size

Segmentation = list[list[float]] | dict[str, Any]
"""Polygons as [x1, y1, x2, y2, ...] each, or run lengths as {"size": [H, W], "counts": str | list[int]}."""


def decode_mask(segmentation: Segmentation, size: Size) -> NDArray[np.bool_]:
    """(H, W) bool mask of one object: the union of its polygons, or its run lengths.

    Raises:
        DataError: if the segmentation is malformed or belongs to an image of another size.
    """
    try:
        if isinstance(segmentation, dict):
            return _from_runs(segmentation, size)
        return _from_polygons(segmentation, size)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"segmentation is malformed ({error}): correct or remove the annotation") from error


def encode_mask(mask: Tensor | NDArray[np.bool_]) -> dict[str, Any]:
    """An (H, W) bool mask as compressed run lengths that json can hold."""
    code = rle.encode(np.asfortranarray(np.asarray(mask), np.uint8))
    counts = code["counts"]
    return {"size": list(mask.shape), "counts": counts if isinstance(counts, str) else counts.decode()}


def _from_polygons(polygons: list[list[float]], size: Size) -> NDArray[np.bool_]:
    height, width = size
    valid = []
    for polygon in polygons:
        points = np.asarray(polygon, np.float64)
        if points.ndim != 1 or len(points) % 2:
            raise ValueError("a polygon is a list x1, y1, x2, y2, ...")
        # The rasteriser walks along the outline: far or infinite points would exhaust its memory.
        x, y = points[::2], points[1::2]
        if not ((np.abs(x) <= 2 * width) & (np.abs(y) <= 2 * height)).all():
            raise ValueError("a point of a polygon lies far outside of the image")
        if len(x) >= 3:  # fewer points have no area, and four numbers would be taken for a box
            valid.append(points.tolist())
    if not valid:
        raise ValueError("no polygon with at least three points")
    return rle.decode(rle.merge(rle.frPyObjects(valid, height, width))).astype(np.bool_)


def _from_runs(code: dict[str, Any], size: Size) -> NDArray[np.bool_]:
    # Decoded here because pycocotools leaves pixels uninitialised where the runs end too early.
    if list(code["size"]) != list(size):
        raise ValueError(f"run lengths are for an image of {code['size']}, not {list(size)} (H, W)")
    counts = code["counts"]
    runs = np.asarray(counts if isinstance(counts, list) else _uncompress(counts), np.int64)
    if (runs < 0).any() or runs.sum() != size[0] * size[1]:
        raise ValueError("run lengths do not add up to the image")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size[::-1]).T


def _uncompress(counts: str | bytes) -> list[int]:
    """Runs from COCO's text: 5 bits per character (offset 48, bit 5 continues); from run 3 on, minus run i-2."""
    runs: list[int] = []
    value = shift = 0
    for byte in counts.encode() if isinstance(counts, str) else counts:
        bits = byte - 48
        if not 0 <= bits < 64 or shift > 30:
            raise ValueError("counts are not COCO run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("counts end in the middle of a number")
    return runs
