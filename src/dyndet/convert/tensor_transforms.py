"""Where a source's layer keeps the same numbers in another order or shape."""

from __future__ import annotations

from torch import Tensor


def linear_of_1x1(weight: Tensor) -> Tensor:
    """(out, in, 1, 1) -> (out, in): a 1x1 convolution of a pooled map is a linear layer."""
    return weight.flatten(1)


def merged_by_position(tensor: Tensor) -> Tensor:
    """Input channels of Swin's patch merging, (4 C) last, from (channel, row, column) to (column, row, channel).

    mmdetection unfolds 2x2 patches, so that the channel runs slowest; timm, like the Swin authors, stacks the positions
    (0, 0), (1, 0), (0, 1), (1, 1) (row, column), so that it runs fastest. For the norm before it (4 C,) and the
    reduction (2 C, 4 C) alike.
    """
    split = tensor.unflatten(-1, (-1, 2, 2))  # channel, row, column
    return split.transpose(-1, -3).flatten(-3)


def background_first(tensor: Tensor) -> Tensor:
    """Rows of a classifier of K + 1 classes: background from the last row to the first."""
    return tensor.roll(1, 0)


def without_batch(tensor: Tensor) -> Tensor:
    """(1, C, 1, 1) -> (C, 1, 1)."""
    return tensor.squeeze(0)


def anchor_pairs(tensor: Tensor) -> Tensor:
    """(L, 1, A, 1, 1, 2) -> (L, A, 2)."""
    return tensor.flatten(1).unflatten(1, (-1, 2))
