"""Text files of data sets: labels, lists, names and yamls."""

from __future__ import annotations

import os
import stat
from pathlib import Path

LARGEST = 64 * 2**20


def read_text(file: str | Path) -> str:
    """A text in UTF-8, with or without a mark in front.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no text, or none that a data set would hold: a device or a pipe never ends.
    """
    status = os.stat(file)  # noqa: PTH116 - of many files
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no plain file")
    if status.st_size > LARGEST:
        raise ValueError(f"it has {status.st_size} bytes, more than {LARGEST}")
    return Path(file).read_text("utf-8-sig")
