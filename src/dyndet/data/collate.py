"""From samples to a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dyndet.errors import DataError, UserError
from dyndet.inputs import check_images
from dyndet.structures import Batch, ImageBatch, Sample


class Collate:
    """Pads uint8 images with zeros at the bottom and right to one size, a multiple of `pad_multiple`.

    Masks keep the size of their image: padding holds no objects.

    Args:
        pad_multiple: in pixels, see `Preprocess`.
    """

    def __init__(self, pad_multiple: int = 32) -> None:
        if pad_multiple < 1:
            raise UserError(f"pad_multiple must be at least 1, not {pad_multiple}")
        self.pad_multiple = pad_multiple

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        pixels = [sample.image for sample in samples]
        check_images(pixels)
        images = ImageBatch.of(pixels, self.pad_multiple)
        for target in (sample.target for sample in samples):
            if min(target.original_size) < 1:
                raise DataError(
                    f"image {target.image_id} {target.path}: original_size is {target.original_size}; "
                    "the dataset must set it to the (H, W) on disk, because detections are returned in these pixels"
                )
        images.original_sizes = torch.tensor([sample.target.original_size for sample in samples], dtype=torch.int64)
        return Batch(images, [sample.target for sample in samples])
