"""Images to predict on: what a path, a folder or a glob names."""

from __future__ import annotations

import glob
from pathlib import Path

import torch

from dyndet.data.images import SUFFIXES, read_image
from dyndet.errors import UserError
from dyndet.structures import Sample, Target


def find_images(source: str) -> list[Path]:
    """The images that a path, a folder or a glob names, sorted.

    Raises:
        UserError: if there are none.
    """
    path = Path(source)
    found = [path] if path.is_file() else list(path.iterdir()) if path.is_dir() else map(Path, glob.glob(source))  # noqa: PTH207 - absolute globs too
    images = sorted(item for item in found if item.suffix.lower() in SUFFIXES)
    if not images:
        raise UserError(f"source={source}: no images there; give an image, a folder of images or a quoted glob")
    return images


def read_unlabelled(path: Path) -> Sample:
    """An image as a sample without objects, ready for the transforms of evaluation."""
    image = read_image(path)
    none = torch.zeros(0, dtype=torch.int64)
    size = (int(image.shape[1]), int(image.shape[2]))
    return Sample(image, Target(torch.zeros(0, 4), none, none.bool(), original_size=size, path=str(path)))
