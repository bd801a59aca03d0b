"""Images whose last bytes are missing, read as far as they go."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import ImageFile

MOST_MISSING = 0.05
"""Share of rows that may be missing: an image of which more is gone is none."""

_ONE = threading.Lock()


@contextmanager
def truncated_allowed() -> Iterator[None]:
    """Pillow's switch for incomplete files, which holds for the whole process, for a moment."""
    with _ONE:
        before = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def check_complete(pixels: NDArray[np.uint8]) -> None:
    """Judges what was decoded (H, W, 3) of an incomplete file: rows that are not in it have one colour, black or grey.

    Raises:
        ValueError: if more than a few rows are missing.
    """
    missing = max(_plain(pixels), _plain(pixels[::-1]))  # BMP begins with the last row
    if missing > max(16, MOST_MISSING * len(pixels)):  # a JPEG loses rows of blocks
        raise ValueError(f"it is truncated: {missing} of {len(pixels)} rows are missing")


def _plain(pixels: NDArray[np.uint8]) -> int:
    """How many of the last rows have the colour of the last pixel."""
    other = np.flatnonzero((pixels != pixels[-1, -1]).any((1, 2)))
    return len(pixels) - 1 - int(other[-1]) if len(other) else len(pixels)
