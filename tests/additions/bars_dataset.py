"""A dataset of one's own: a sequence of samples, with categories and sizes."""

from __future__ import annotations

import torch

from dyndet.structures import Category, Sample, Target


class BarsDataset:
    """Bright bars on noise, wide (class 0, id 3) or high (class 1, id 7); image i of a seed is always the same.

    Args:
        length: number of images.
        size: their sides in pixels.
        seed: of the set.
    """

    def __init__(self, length: int, *, size: int = 64, seed: int = 0) -> None:
        self.categories = [Category(3, "wide"), Category(7, "high")]
        self.sizes = [(size, size)] * length
        self.seed = seed

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        side = self.sizes[index][0]
        image = torch.randint(0, 80, (3, side, side), generator=generator, dtype=torch.uint8)
        label = int(torch.randint(0, 2, (), generator=generator))
        width, height = (side // 2, side // 4) if label == 0 else (side // 4, side // 2)
        left = int(torch.randint(0, side - width, (), generator=generator))
        top = int(torch.randint(0, side - height, (), generator=generator))
        image[:, top : top + height, left : left + width] += 150
        boxes = torch.tensor([[left, top, left + width, top + height]]).float()
        target = Target(boxes, torch.tensor([label]), torch.zeros(1, dtype=torch.bool))
        target.image_id, target.original_size = index + 1, (side, side)
        return Sample(image, target)
