"""Colour augmentation of uint8 images: brightness, contrast and saturation as one affine map of the pixels."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Generator, Tensor

from dyndet.errors import UserError
from dyndet.structures import Sample


class Photometric:
    """Scales brightness, contrast and saturation by factors drawn from [1 - x, 1 + x].

    Args:
        brightness: x of the brightness, in 0..1; 0 leaves it alone.
        contrast: x of the contrast, in 0..1.
        saturation: x of the saturation, in 0..1.

    Raises:
        UserError: if an amount is outside 0..1.
    """

    def __init__(self, brightness: float = 0.2, contrast: float = 0.2, saturation: float = 0.2) -> None:
        amounts = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        for name, amount in amounts.items():
            if not 0 <= amount <= 1:
                raise UserError(f"{name} is {amount}, but factors are drawn from 1 - x .. 1 + x with x in 0..1")
        self.amounts = tuple(amounts.values())

    def __call__(self, sample: Sample, generator: Generator) -> Sample:
        if not any(self.amounts):
            return sample
        draws = (2 * torch.rand(3, generator=generator) - 1).tolist()
        brightness, contrast, saturation = (1 + x * draw for x, draw in zip(self.amounts, draws, strict=True))
        return replace(sample, image=scale_colours(sample.image, brightness, contrast, saturation))


def scale_colours(image: Tensor, brightness: float, contrast: float, saturation: float) -> Tensor:
    """Brightness, then contrast about the mean grey, then saturation about the grey of each pixel (Rec. 601).

    All three are linear, so they are one affine map of (pixel, grey, mean grey), rounded and clipped once: about ten
    times faster than one after the other, and nothing saturates on the way.

    Args:
        image: (3, H, W) uint8.
        brightness: factor of the pixel.
        contrast: factor of the distance to the mean grey.
        saturation: factor of the distance to the grey.
    """
    pixels = image.float()
    grey = (pixels[0] * 0.299).add_(pixels[1], alpha=0.587).add_(pixels[2], alpha=0.114)
    gain = brightness * contrast
    offset = brightness * (1 - contrast) * float(grey.mean()) + 0.5
    grey.mul_(gain * (1 - saturation)).add_(offset)
    return pixels.mul_(gain * saturation).add_(grey).clamp_(0, 255).to(torch.uint8)
