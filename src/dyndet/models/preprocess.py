"""Pixels to network input. Part of the detector, so that it travels with its weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dyndet.structures import ImageBatch


class Preprocess(nn.Module):
    """Scales to 0..1, normalises, and sets padding to 0 (the mean colour).

    Args:
        mean: per channel, in the order the network reads, in 0..1.
        std: likewise.
        bgr: the network reads blue first (Caffe weights).
        divisor: images are padded to a multiple of this when a batch is made from single images.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        bgr: bool = False,
        divisor: int = 32,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.bgr = bgr
        self.divisor = divisor

    def forward(self, images: ImageBatch) -> Tensor:
        """(B, 3, H, W) float32 network input."""
        pixels = images.pixels
        scaled = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
        if self.bgr:
            scaled = scaled.flip(1)
        normal = (scaled - self.mean) / self.std
        height, width = pixels.shape[-2:]
        if bool((images.sizes == torch.tensor([height, width])).all()):
            return normal
        for slot, (valid_height, valid_width) in zip(normal, images.sizes.tolist(), strict=True):
            slot[:, valid_height:] = 0
            slot[:, :, valid_width:] = 0
        return normal
