"""Pixel values of any file type as 8-bit RGB. What counts as white is said by the type of the file, not by the image:
two frames of one camera keep their relation.

| values | white |
| --- | --- |
| 8 bit, palette, 1 bit, CMYK (stored inverted in JPEG, as Adobe does) | as the format says |
| 16 bit (PNG, PGM, TIFF), 12 bit (TIFF) | 65535, 4095 |
| 16 bit signed (TIFF) | 32767 |
| 32 bit (TIFF) | 255: such files hold 8-bit values of programs that know no smaller integers |
| floats (TIFF) | 1; 255 where a value exceeds 2 |
| any integers of a TIFF whose MaxSampleValue is a power of two less 1, from 255 on | MaxSampleValue |

MaxSampleValue of another form is a statistic of one image. What exceeds white or lies well below 0 has no agreed
meaning and is refused. Alpha is dropped, the colour below it stays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_BITS, _WHITE_IS_ZERO, _MAX, _FORMAT = 258, 262, 281, 339  # TIFF tags
_SIGNED = 2
_OVERSHOOT = 0.01
"""Share of white by which values may leave their range: resampling and the correction of dark frames do that."""


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB.

    Raises:
        ValueError: if its values have no agreed range.
    """
    if image.mode == "F":
        return Image.fromarray(_from_floats(image)).convert("RGB")
    if image.mode.startswith("I"):
        return Image.fromarray(_from_integers(image)).convert("RGB")
    if "transparency" in image.info or image.mode == "RGBa":
        image = image.convert("RGBA")
    return image.convert("RGB")


def _from_integers(image: Image.Image) -> NDArray[np.uint8]:
    values = np.asarray(image)
    if _tag(image, _BITS) == 32 and _tag(image, _FORMAT) != _SIGNED:
        values = values.view(np.uint32)  # Pillow has no such mode
    values = values.astype(np.int64)
    white = _white(image, int(values.max(initial=0)))
    _check(values.min(initial=0), values.max(initial=0), white, slack=0)
    values = values.clip(min=0)
    if _tag(image, _WHITE_IS_ZERO) == 0:
        values = white - values
    return (values * 256 // (white + 1)).astype(np.uint8)  # of 16 bit, the high byte


def _from_floats(image: Image.Image) -> NDArray[np.uint8]:
    values = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0)
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    white = 1 if high <= 2 else 255
    _check(low, high, white, slack=white if white == 1 else white * _OVERSHOOT)
    if _tag(image, _WHITE_IS_ZERO) == 0:
        values = white - values
    return (values * (255 / white)).round().clip(0, 255).astype(np.uint8)


def _white(image: Image.Image, highest: int) -> int:
    bits = int(_tag(image, _BITS) or 16)
    declared = int(_tag(image, _MAX) or 0)
    if declared >= max(255, highest) and declared & (declared + 1) == 0:
        return declared
    if bits > 16:
        return 255
    return 2 ** (bits - 1) - 1 if _tag(image, _FORMAT) == _SIGNED else 2**bits - 1


def _check(low: float, high: float, white: int, *, slack: float) -> None:
    if low < -white * _OVERSHOOT or high > white + slack:
        raise ValueError(
            f"values {low:g} to {high:g}, where 0 to {white} is expected of this type of file: save it as 8 or 16 bit"
        )


def _tag(image: Image.Image, tag: int) -> Any:
    """A tag of a TIFF, the first value of several; None for other files."""
    value = getattr(image, "tag_v2", {}).get(tag)
    return value[0] if isinstance(value, tuple) and value else value
