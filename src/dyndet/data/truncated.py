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
    """Judges a decoded image (H, W, ...) by its last rows: what is not in the file stays black.

    Raises:
        ValueError: if more than a few rows are missing.
    """
    filled = np.flatnonzero(pixels.reshape(len(pixels), -1).any(1))
    missing = len(pixels) - (int(filled[-1]) + 1 if len(filled) else 0)
    if missing > max(8, MOST_MISSING * len(pixels)):  # a JPEG loses rows of blocks
        raise ValueError(f"it is truncated: {missing} of {len(pixels)} rows are missing")
