"""From raw maps to rows: what all dense predictors do before their losses and their decoding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dyndet.errors import UserError
from dyndet.models.detectors.base import RawMaps
from dyndet.structures import Size, Target


def flat(maps: Tensor, width: int) -> Tensor:
    """(B, A*D, H, W) -> float32 (B, H*W*A, D), with D = `width`."""
    return maps.permute(0, 2, 3, 1).reshape(len(maps), -1, width).float()


def flat_levels(raw: RawMaps, name: str, width: int) -> Tensor:
    """The maps called `name` of all levels -> float32 (B, P, D)."""
    return torch.cat([flat(level[name], width) for level in raw], 1)


def shapes_of(raw: RawMaps) -> list[Size]:
    """(H, W) of every level."""
    return [(level["cls"].shape[-2], level["cls"].shape[-1]) for level in raw]


def level_shares(positive: Sequence[Tensor], counted: Sequence[Tensor] | None) -> Tensor:
    """The (L,) share of every level's positions that are positive, over the whole batch.

    Args:
        positive: L x (B, H*W) bool.
        counted: L x (B, 1, H, W) bool, positions that count; None for all.
    """
    areas = [torch.ones_like(level) for level in positive] if counted is None else [mask.flatten(1) for mask in counted]
    return torch.stack(
        [(level & area).sum() / area.sum().clamp(min=1) for level, area in zip(positive, areas, strict=True)]
    )


def check_labels(targets: Sequence[Target], num_classes: int) -> None:
    """Counting labels from 1 is a common mistake; the last class would quietly be background.

    Raises:
        UserError: if a label is not in 0..K-1.
    """
    seen = torch.cat([target.labels for target in targets])
    if len(seen) and not 0 <= int(seen.min()) <= int(seen.max()) < num_classes:
        first = next(i for i, x in enumerate(targets) if bool(((x.labels < 0) | (x.labels >= num_classes)).any()))
        raise UserError(
            f"labels must lie in 0..{num_classes - 1} (num_classes={num_classes}), but reach from "
            f"{int(seen.min())} to {int(seen.max())} (first in targets[{first}]): count classes from 0"
        )


def widened(valid: Sequence[Tensor], strides: Sequence[int], divisor: int) -> list[Tensor]:
    """Valid masks as if every image were padded to multiples of `divisor` pixels: mmdetection's validity flags.

    Args:
        valid: L x (B, 1, H, W) bool.
        strides: per level; the first must divide `divisor`.
        divisor: in pixels.

    Raises:
        ValueError: if it is no multiple of the first stride.
    """
    if divisor % strides[0]:
        raise ValueError(f"valid_divisor={divisor} must be a multiple of the finest stride, {strides[0]}")
    finest = valid[0]
    masks = []
    for mask, stride in zip(valid, strides, strict=True):
        rows, columns = (
            (torch.arange(length, device=mask.device) * stride // divisor * divisor // strides[0]).clamp(max=limit - 1)
            for length, limit in zip(mask.shape[-2:], finest.shape[-2:], strict=True)
        )
        masks.append(finest[:, :, rows][..., columns])
    return masks


def check_kernel(kernel: int) -> None:
    """Predictors end with an odd kernel: an even one has no centre.

    Raises:
        ValueError: if it is even.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel must be odd, got {kernel}")


def last_conv(channels: int, outputs: int, kernel: int, *, separable: bool = False) -> nn.Module:
    """The convolution a predictor ends with, with bias: ordinary, or depthwise then 1x1 (EfficientDet)."""
    check_kernel(kernel)
    padding = kernel // 2
    if not separable:
        return nn.Conv2d(channels, outputs, kernel, padding=padding)
    depthwise = nn.Conv2d(channels, channels, kernel, padding=padding, groups=channels, bias=False)
    return nn.Sequential(depthwise, nn.Conv2d(channels, outputs, 1))
