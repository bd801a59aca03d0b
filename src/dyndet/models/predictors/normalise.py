"""What the summed losses of a batch are divided by: every code base counts positives in its own way."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from dyndet.ops.distributed import reduce_mean

Mode = Literal["images", "total", "ema", "per_image"]


class Normaliser(nn.Module):
    """Divisor of every image's summed loss, from its number of positives.

    Args:
        mode: "images": the sum over images of max(positives, 1), mean over processes (mmdetection). "total":
            max(positives of the batch, mean over processes, 1) (the authors' ATSS, FCOS). "ema": a moving average of
            the batch's max(positives, 1), of one process (detectron2; of several, the first one). "per_image": each
            image by its own max(positives, 1), then the mean over images (torchvision).
        momentum: of the moving average.
        start: of the moving average (100 RetinaNet, 300 FCOS).
    """

    average: Tensor

    def __init__(self, mode: Mode = "images", *, momentum: float = 0.9, start: float = 100.0) -> None:
        super().__init__()
        if mode not in ("images", "total", "ema", "per_image"):
            raise ValueError(f"normaliser mode must be one of images, total, ema, per_image, got {mode!r}")
        self.mode: Mode = mode
        self.momentum = momentum
        if mode == "ema":
            self.register_buffer("average", torch.tensor(float(start)))

    def forward(self, positives: Tensor) -> Tensor:
        """(B,) numbers of positives -> (B,) divisors; in training the moving average moves on."""
        counts = positives.float()
        if self.mode == "per_image":
            return counts.clamp(min=1) * len(counts)
        if self.mode == "images":
            total = reduce_mean(counts.clamp(min=1).sum())
        elif self.mode == "total":
            total = reduce_mean(counts.sum()).clamp(min=1)
        else:
            if self.training:
                with torch.no_grad():
                    self.average.lerp_(counts.sum().clamp(min=1).to(self.average), 1 - self.momentum)
            total = self.average.to(counts, copy=True)  # it moves on, the divisor stays
        return total.expand(len(counts))
