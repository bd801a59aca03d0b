"""Pixels to network input. Part of the detector, so that it travels with its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dyndet.structures import ImageBatch, Size


class Preprocess(nn.Module):
    """Scales to 0..1, normalises, and sets padding to one colour.

    Args:
        mean: per channel, in the order the network reads, in 0..1.
        std: likewise.
        bgr: the network reads blue first (Caffe weights).
        pad_multiple: images are padded to a multiple of this when a batch is made from single images.
        fill: grey of the padding in 0..1; None is the mean colour.
        centred: images lie in the middle of a canvas instead of at its top left, in evaluation: YOLO's rectangular
            geometry. Its sides are ceil(side / pad_multiple + 1/2) * pad_multiple, so there is always padding, which is
            treated like the image.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        bgr: bool = False,
        pad_multiple: int = 32,
        fill: float | None = None,
        centred: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.bgr = bgr
        self.pad_multiple = pad_multiple
        self.fill = fill
        self.centred = centred

    def canvas(self, size: Sequence[int]) -> Size:
        """(H, W) of the canvas on which an image of this size is evaluated by itself; the size, unless `centred`."""
        height, width = size
        if not self.centred:
            return height, width
        multiple = self.pad_multiple  # ceil(side / multiple + 1/2) in integers
        return (
            -(-(2 * height + multiple) // (2 * multiple)) * multiple,
            -(-(2 * width + multiple) // (2 * multiple)) * multiple,
        )

    def place(self, images: ImageBatch) -> ImageBatch:
        """The batch on its canvas: as it is, or in evaluation with `centred` moved to the middle of a larger one."""
        if not self.centred or self.training or images.offsets is not None:
            return images
        height, width = self.canvas(images.sizes.amax(0).tolist())
        room = torch.tensor([height, width]) - images.sizes
        offsets = room // 2  # an odd pixel goes to the bottom and right
        canvas = images.pixels.new_zeros(len(images), 3, height, width)
        for slot, image, (rows, columns), (top, left) in zip(
            canvas, images.pixels, images.sizes.tolist(), offsets.tolist(), strict=True
        ):
            slot[:, top : top + rows, left : left + columns] = image[:, :rows, :columns]
        return replace(images, pixels=canvas, offsets=offsets)

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
        padding = torch.zeros_like(self.mean) if self.fill is None else (self.fill - self.mean) / self.std
        offsets = torch.zeros_like(images.sizes) if images.offsets is None else images.offsets
        for slot, (rows, columns), (top, left) in zip(normal, images.sizes.tolist(), offsets.tolist(), strict=True):
            slot[:, :top] = padding
            slot[:, top + rows :] = padding
            slot[:, :, :left] = padding
            slot[:, :, left + columns :] = padding
        return normal
