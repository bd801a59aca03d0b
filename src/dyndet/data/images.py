"""Image files, which may be anything: read safely, as RGB, in the pixels that annotations refer to.

EXIF orientation is ignored on purpose: COCO annotations, and those of most tools, refer to the stored pixel array.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dyndet.errors import DataError
from dyndet.structures import Size

MAX_PIXELS = 64_000_000
"""A decoded image of this many pixels takes 192 MB."""

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
"""Of files that count as images when a folder is listed."""

# Pillow knows many more, some of which start other programs (EPS) or are rarely tested.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decodes an image file to uint8 (3, H, W) RGB.

    Grey is repeated, palettes and CMYK are converted, alpha is dropped (the colour below it stays), of 16 bit the high
    byte is kept, of an animation the first frame. The image is not rotated by its EXIF orientation.

    Args:
        path: JPEG, PNG, BMP, WebP, TIFF, GIF or PPM.
        max_pixels: more are refused, judged by the header alone.

    Raises:
        DataError: if the file is missing, empty, truncated, too large or not an image.
    """
    with _opened(path, max_pixels) as image:
        pixels = np.array(_to_rgb(image))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def image_size(path: str | Path) -> Size:
    """(H, W) from the header, without decoding.

    Raises:
        DataError: if the file is missing or does not start like an image.
    """
    with _opened(path) as image:
        return image.height, image.width


def resolve_inside(root: str | Path, name: str | Path) -> Path:
    """`root / name` for a name that comes out of a data file and must not lead elsewhere.

    Raises:
        DataError: if the name leaves `root` by `..`, as an absolute path or through a symbolic link.
    """
    root, text = Path(root), str(name)
    path = root / text
    try:
        # A drive or share is refused unresolved (resolving it may touch the network); "/" may still lead inside.
        inside = not PureWindowsPath(text).drive and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))
    except (OSError, ValueError):  # null byte, say
        inside = False
    if not inside or not text:
        raise DataError(
            f"file name {text!r} does not lie inside {root}: name a file in that folder, not a link out of it"
        )
    return path


@contextmanager
def _opened(path: str | Path, max_pixels: int | None = None) -> Iterator[Image.Image]:
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise DataError(
                    f"image {path} has {image.width} x {image.height} pixels, more than the limit of {max_pixels}: "
                    "shrink it or cut it into tiles"
                )
            yield image
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(
            f"image {path} does not exist: check the image folder and the names in the annotations"
        ) from error
    except Exception as error:  # Pillow's decoders raise nearly anything on hostile bytes
        raise DataError(f"image {path} cannot be decoded ({error}): replace it or remove it from the set") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bit grey, which convert() would saturate
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
