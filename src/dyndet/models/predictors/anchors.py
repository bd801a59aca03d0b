"""Anchor boxes of a pyramid, and how boxes are written as deltas to them. Boxes are xyxy in pixels, no +1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dyndet.ops.grid import level_points
from dyndet.structures import Size


@dataclass(frozen=True)
class AnchorGrid:
    """The same A shapes at every position of a level, in multiples of its stride.

    Attributes:
        scales: side lengths in strides.
        ratios: height / width of every scale; areas stay the same.
        offset: where in its cell an anchor's centre lies, in strides: 0 corner, 0.5 centre.
        order: which runs fastest among the A anchors of a position: "scale" (mmdetection) or "ratio" (detectron2).
    """

    scales: Sequence[float]
    ratios: Sequence[float] = (1.0,)
    offset: float = 0.0
    order: Literal["scale", "ratio"] = "scale"

    def __post_init__(self) -> None:
        if self.order not in ("scale", "ratio"):
            raise ValueError(f"order must be 'scale' or 'ratio', got {self.order!r}")

    @classmethod
    def octaves(
        cls, *, base: float = 4.0, per_octave: int = 3, ratios: Sequence[float] = (0.5, 1.0, 2.0), offset: float = 0.0,
        order: Literal["scale", "ratio"] = "scale",
    ) -> AnchorGrid:  # fmt: skip
        """Scales base * 2^(i / per_octave), as RetinaNet has them."""
        return cls([base * 2 ** (i / per_octave) for i in range(per_octave)], list(ratios), offset, order)

    @property
    def per_position(self) -> int:
        """A."""
        return len(self.scales) * len(self.ratios)

    def shapes(self) -> Tensor:
        """(A, 2) width, height in strides."""
        pairs = [(scale, ratio) for ratio in self.ratios for scale in self.scales]
        if self.order == "ratio":
            pairs = [(scale, ratio) for scale in self.scales for ratio in self.ratios]
        return torch.tensor([(scale / math.sqrt(ratio), scale * math.sqrt(ratio)) for scale, ratio in pairs])

    def __call__(self, shape: Size, stride: int, device: torch.device) -> Tensor:
        """(H*W*A, 4) anchors of a level of this shape: row-major positions, then the A shapes."""
        centres = level_points(shape, stride, self.offset, device)[:, None]
        half = self.shapes().to(device) * (stride / 2)
        return torch.cat([centres - half, centres + half], -1).flatten(0, 1)


@dataclass(frozen=True)
class BoxCoder:
    """Deltas (centre shift over anchor size, log of the size ratio), divided by `std`.

    Attributes:
        std: of x, y, w, h.
        clamp: log ratios are kept below log(1000 / 16); "both" also above its negative (mmdetection), "upper" not
            (detectron2).
    """

    std: Sequence[float] = (1.0, 1.0, 1.0, 1.0)
    clamp: Literal["both", "upper"] = "both"

    def __post_init__(self) -> None:
        if self.clamp not in ("both", "upper"):
            raise ValueError(f"clamp must be 'both' or 'upper', got {self.clamp!r}")

    def encode(self, anchors: Tensor, boxes: Tensor) -> Tensor:
        """(..., 4) anchors and boxes -> (..., 4) deltas."""
        centre, size = _centre_size(anchors)
        wanted_centre, wanted_size = _centre_size(boxes)
        size, wanted_size = size.clamp(min=_TINY), wanted_size.clamp(min=_TINY)
        deltas = torch.cat([(wanted_centre - centre) / size, (wanted_size / size).log()], -1)
        return deltas / deltas.new_tensor(self.std)

    def decode(self, anchors: Tensor, deltas: Tensor) -> Tensor:
        """(..., 4) anchors and deltas -> (..., 4) boxes."""
        centre, size = _centre_size(anchors)
        shift, log_ratio = (deltas * deltas.new_tensor(self.std)).split(2, -1)
        log_ratio = log_ratio.clamp(max=_LARGEST, min=-_LARGEST if self.clamp == "both" else None)
        centre, half = centre + shift * size, size * log_ratio.exp() / 2
        return torch.cat([centre - half, centre + half], -1)


@dataclass(frozen=True)
class AnchorTargets:
    """Targets of the P anchors of one image, or of B images with a dimension in front.

    Attributes:
        labels: (P,) int64: 0..K-1, K for background, -1 where an anchor neither is nor counts as background.
        boxes: (P, 4) matched boxes; garbage where nothing is matched.
    """

    labels: Tensor
    boxes: Tensor


_LARGEST = math.log(1000 / 16)
_TINY = 1e-6  # boxes without area have no logarithm


def _centre_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    low, high = boxes.split(2, -1)
    return (low + high) / 2, high - low
