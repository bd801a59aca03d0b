"""What makes an image hard: by how much the second detector must win (DynamicDet).

Source: Lin et al., CVPR 2023, arXiv:2304.05552.

The router minimises (1 - s) (L1 - D/2) + s (L2 + D/2) with difficulty s and the losses L1 and L2 of both detectors. Its
gradient depends on d = L1 - L2 and the offset D alone: images with d > D should be hard.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

OffsetName = Literal["exact_median", "running_median", "zero", "weight"]
"""The median of d over the training set; over all images so far (published); 0 or a constant (the naive variants)."""


class Offset(Protocol):
    """D, given the differences (B,) of the batch at hand."""

    def __call__(self, differences: Tensor) -> float: ...

    def state(self) -> list[float]:
        """What a resumed run needs to go on, plain numbers."""
        ...

    def restore(self, state: Sequence[float]) -> None: ...


class Constant:
    """Always the same D."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, differences: Tensor) -> float:
        return self.value

    def state(self) -> list[float]:
        return [self.value]

    def restore(self, state: Sequence[float]) -> None:
        (self.value,) = state


class RunningMedian:
    """The median of all differences so far, this batch included.

    Args:
        exact_until: after so many images it is taken anew only every `every` images, as published.
        every: see above.
    """

    def __init__(self, *, exact_until: int = 10_000, every: int = 1000) -> None:
        self.exact_until = exact_until
        self.every = every
        self._sorted: list[float] = []
        self._median = 0.0

    def __call__(self, differences: Tensor) -> float:
        for value in filter(math.isfinite, differences.tolist()):  # no number would stay in its place for good
            insort(self._sorted, value)
            count = len(self._sorted)
            if count < self.exact_until or count % self.every == 0:
                self._median = _middle(self._sorted)
        return self._median

    def state(self) -> list[float]:
        return [self._median, *self._sorted]

    def restore(self, state: Sequence[float]) -> None:
        self._median, *self._sorted = state


def make_offset(name: OffsetName, *, differences: Tensor | None, weight: float = 0.0) -> Offset:
    """The offset of this name.

    Args:
        name: see `OffsetName`.
        differences: (N,) of the whole training set, where they are known beforehand.
        weight: D of "weight".

    Raises:
        ValueError: on another name, or an exact median of what is not known.
    """
    if name == "zero":
        return Constant(0.0)
    if name == "weight":
        return Constant(weight)
    if name == "running_median":
        return RunningMedian()
    if name != "exact_median":
        raise ValueError(f"offset must be exact_median, running_median, zero or weight, got {name!r}")
    if differences is None:
        raise ValueError("an exact median needs all differences beforehand: cache them, or take running_median")
    return Constant(_middle(differences.sort().values.tolist()))


def router_loss(difficulty: Tensor, losses: Tensor, offset: float) -> Tensor:
    """The mean of (1 - s) (L1 - D/2) + s (L2 + D/2).

    Args:
        difficulty: (B,) logits of s.
        losses: (2, B) L1 and L2, without gradient.
        offset: D.
    """
    first, second = losses[0] - offset / 2, losses[1] + offset / 2
    return (torch.sigmoid(-difficulty) * first + difficulty.sigmoid() * second).mean()


def _middle(ascending: Sequence[float]) -> float:
    count = len(ascending)
    return (ascending[(count - 1) // 2] + ascending[count // 2]) / 2
