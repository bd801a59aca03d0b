"""Right answers in float64, and what is compared with them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyndet.models.heads.paths import DepthPath

from .masks import dilated


def conv(maps: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    """A 3x3 convolution of every level."""
    return [F.conv2d(x.double(), weight.double(), padding=1) for x in maps]


def block(
    path: DepthPath, maps: Sequence[Tensor], gates: Sequence[Tensor], masks: Sequence[Tensor], stats: str
) -> list[Tensor]:
    """ReLU(x + gate * path(x)) whose first norm sees the neighbourhood of the mask and whose second sees the mask."""
    outputs = []
    for x, gate, mask in zip(maps, gates, masks, strict=True):
        (hidden,) = conv([x], path.conv1.weight)
        hidden = _norm(hidden, dilated(mask), path.norm1, stats).relu()
        (hidden,) = conv([hidden], path.conv2.weight)
        outputs.append((x.double() + gate.double() * _norm(hidden, mask, path.norm2, stats)).relu())
    return outputs


def _norm(x: Tensor, mask: Tensor, norm: nn.GroupNorm, stats: str) -> Tensor:
    """GroupNorm of the positions of a mask, zero elsewhere, image by image."""
    out = torch.zeros_like(x)
    affine = norm.weight.double(), norm.bias.double()
    for image, values, active in zip(out, x, mask[:, 0], strict=True):
        rows = values[:, active]
        if stats == "position":
            image[:, active] = F.group_norm(rows.t(), norm.num_groups, *affine, norm.eps).t()
        else:
            image[:, active] = F.group_norm(rows[None], norm.num_groups, *affine, norm.eps)[0]
    return out


def distance(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||; NaN where a value is."""
    return float((found.double() - wanted).norm() / wanted.norm())


def worst(distances: Sequence[float]) -> float:
    """The largest; NaN where one is."""
    return max(distances, key=lambda value: math.inf if math.isnan(value) else value)


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, fresh memory holds NaN: what nobody wrote but somebody read shows in the result."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # the mode in which torch fills what it allocates
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before)
