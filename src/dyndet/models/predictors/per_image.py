"""Losses of every image by itself: what decides how hard an image is for a detector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dyndet.models.detectors.base import Predictor, RawMaps
from dyndet.structures import Target


def image_losses(
    predictor: Predictor, raw: RawMaps, targets: Sequence[Target], valid: Sequence[Tensor] | None = None
) -> Tensor:
    """The total loss that each image would have in a batch of its own: every mean is taken inside the image.

    Call it in eval mode, or in training mode moving averages take a step per image.

    Args:
        predictor: any dense predictor.
        raw: its maps of B images.
        targets: per image, without crowd.
        valid: L x (B, 1, H, W) bool, False on padding.

    Returns:
        (B,) float32.
    """
    totals = []
    for index, target in enumerate(targets):
        this = slice(index, index + 1)
        maps = [{name: value[this] for name, value in level.items()} for level in raw]
        masks = None if valid is None else [mask[this] for mask in valid]
        totals.append(torch.stack(list(predictor.losses(maps, [target], masks).values())).sum())
    return torch.stack(totals)
