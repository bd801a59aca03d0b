"""Colours, fonts and panels that all pictures share."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Color = tuple[int, int, int]

INK: Color = (34, 34, 40)
PAPER: Color = (255, 255, 255)
MIN_SIDE = 320
"""Smaller images are enlarged by a whole factor before anything is drawn on them."""
HEAT = "magma"
"""Matplotlib colour map of every heat picture."""


def class_color(label: int) -> Color:
    """A colour per class: hues by the golden angle, lightness in three steps, so that neighbours differ in both."""
    hue = (0.02 + label * 0.618034) % 1
    lightness = (0.55, 0.42, 0.68)[label % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.85)
    return round(red * 255), round(green * 255), round(blue * 255)


def text_color(background: Color) -> Color:
    """Black or white, whichever reads better on it: one of them has a contrast of at least 4.58 (WCAG 2.2)."""
    return max(((0, 0, 0), PAPER), key=lambda color: contrast(color, background))


def contrast(one: Color, other: Color) -> float:
    """1 (none) to 21 (black on white), WCAG 2.2; text wants 4.5."""
    low, high = sorted(_luminance(color) for color in (one, other))
    return (high + 0.05) / (low + 0.05)


def _luminance(color: Color) -> float:
    parts = [part / 255 / 12.92 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in color]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def letter_size(picture: Image.Image) -> int:
    """Of letters that can be read when the picture fills a screen or a page."""
    return max(12, round(max(picture.size) / 56))


@cache
def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and covers most scripts' letters."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def to_picture(image: Tensor) -> Image.Image:
    """A (3, H, W) tensor, uint8 or float in 0..1, as a PIL image."""
    image = image.detach().cpu()
    if image.is_floating_point():
        image = (image.float().clamp(0, 1) * 255).round()
    return Image.fromarray(image.to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def enlargement(picture: Image.Image, min_side: int = MIN_SIDE) -> int:
    """The whole factor that brings the longer side to `min_side` pixels or more."""
    return -(-min_side // max(picture.size))


def enlarged(picture: Image.Image, factor: int) -> Image.Image:
    """Larger by a whole factor, pixels kept sharp."""
    width, height = picture.size
    return picture if factor == 1 else picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)


def heat(values: Tensor) -> Image.Image:
    """(H, W) values in 0..1 in the colours of `HEAT`."""
    colors = matplotlib.colormaps[HEAT](values.detach().cpu().clamp(0, 1).numpy())
    return Image.fromarray((colors[..., :3] * 255).round().astype(np.uint8))


def fitted(text: str, width: int, size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The largest font up to `size` in which the text is at most `width` pixels wide (but no smaller than 8)."""
    while size > 8 and font(size, bold=bold).getlength(text) > width:
        size -= 1
    return font(size, bold=bold)


def captioned(picture: Image.Image, caption: str) -> Image.Image:
    """The picture under a line of text, 22 pixels high or, on large pictures, more."""
    size = letter_size(picture) + 2
    height = round(1.6 * size)
    panel = Image.new("RGB", (picture.width, picture.height + height), PAPER)
    panel.paste(picture, (0, height))
    text = fitted(caption, picture.width - 4, size)
    ImageDraw.Draw(panel).text((2, height / 2), caption, fill=INK, font=text, anchor="lm")
    return panel


def side_by_side(panels: Sequence[Image.Image], *, gap: int = 6) -> Image.Image:
    """Panels from left to right on white, tops aligned."""
    width = sum(panel.width for panel in panels) + gap * (len(panels) + 1)
    strip = Image.new("RGB", (width, max(panel.height for panel in panels) + 2 * gap), PAPER)
    left = gap
    for panel in panels:
        strip.paste(panel, (left, gap))
        left += panel.width + gap
    return strip
