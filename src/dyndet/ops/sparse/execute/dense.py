"""Convolutions of rows by dense convolutions of every level: the reference, and the faster way at high density."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dyndet.layout import RowLayout


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: RowLayout, source: Tensor | None, target: Tensor | None
) -> Tensor:
    """Rows of a 3x3 convolution, depthwise where the weight has one input channel.

    Args:
        x: (R + 1, C) source rows, the last one zero.
        weight: (O, C, 3, 3), or (C, 1, 3, 3).
        bias: (O,) or None.
        layout: of the positions.
        source: int32 (R,), the position of every source row, P for a spare one; None when the rows are the map.
        target: int32 (capacity,), that of every target row; likewise.

    Returns:
        (capacity + 1, O), the last row zero.
    """
    maps = layout.maps(x if source is None else _expand(x, source, layout))
    groups = x.shape[1] // weight.shape[1]
    dense = [F.conv2d(level, weight, bias, padding=1, groups=groups) for level in maps]
    out = x.new_empty((layout.positions if target is None else len(target)) + 1, len(weight))
    out[-1] = 0
    if target is None:
        for view, level in zip(layout.maps(out), dense, strict=True):
            view.copy_(level)
        return out
    return _select(layout.rows(dense), target) if target.is_cuda else _pick(dense, layout, target, out)


def conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, layout: RowLayout, source: Tensor | None, target: Tensor | None,
    needs: tuple[bool, bool], into: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of `conv` for its input and its weight, each where `needs` asks for it.

    Args:
        grad: (capacity + 1, O), of the output; the last row does not count.
        needs: input, weight.
        into: (R + 1, C), what the input's gradient is added to, in place, where the rows are the map; None begins with
            zeros.

    Returns:
        (R + 1, C) and the weight's shape.
    """
    groups = x.shape[1] // weight.shape[1]
    maps = layout.maps(x if source is None else _expand(x, source, layout))
    grads = layout.maps(grad if target is None else _expand(grad, target, layout))
    grad_x = None
    if needs[0]:
        grad_x = x.new_empty(layout.positions + 1, x.shape[1]) if into is None else into
    views = [None] * len(maps) if grad_x is None else layout.maps(grad_x)
    grad_weight: Tensor | None = None
    for level, part, view in zip(maps, grads, views, strict=True):
        of_map, of_weight, _ = torch.ops.aten.convolution_backward(
            part, level, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], groups, [*needs, False]
        )
        if view is not None:
            view.copy_(of_map) if into is None else view.add_(of_map)
        if needs[1]:
            grad_weight = of_weight if grad_weight is None else grad_weight + of_weight
    if grad_x is not None:
        grad_x[-1] = 0
        if source is not None:
            grad_x = _select(grad_x, source)
    return grad_x, grad_weight


def _select(rows: Tensor, positions: Tensor) -> Tensor:
    """Map rows at the positions, and the last one."""
    last = positions.new_full((1,), len(rows) - 1)
    return rows.index_select(0, torch.cat([positions, last]))


def _pick(maps: Sequence[Tensor], layout: RowLayout, positions: Tensor, out: Tensor) -> Tensor:
    """Map rows at ascending positions, level by level, so that nothing else is copied; reads values."""
    bounds = torch.searchsorted(positions, torch.tensor([stop for _, stop in layout.levels], dtype=positions.dtype))
    first = 0
    for (start, stop), last, level in zip(layout.levels, bounds.tolist(), maps, strict=True):
        rows = level.permute(0, 2, 3, 1).reshape(stop - start, -1)
        torch.index_select(rows, 0, positions[first:last] - start, out=out[first:last])
        first = last
    return out


def _expand(rows: Tensor, positions: Tensor, layout: RowLayout) -> Tensor:
    """Rows put where they belong on the map, (P + 1, C), zero elsewhere."""
    out = rows.new_zeros(layout.positions + 1, rows.shape[1]).index_copy_(0, positions.long(), rows[:-1])
    out[-1] = 0  # where spare rows went
    return out
