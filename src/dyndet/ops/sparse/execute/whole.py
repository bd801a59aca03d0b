"""The depth step where every position is computed: level by level, on maps, with nothing copied in between."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dyndet.layout import RowLayout
from dyndet.ops.sparse.execute.norm import Stats, normalise, normalise_backward
from dyndet.ops.sparse.parameters import ConvNorm

_STATES = 8  # that a level keeps for the backward direction


def depth(
    x: Tensor, first: ConvNorm, second: ConvNorm, gate: Tensor, layout: RowLayout, stats: Stats
) -> tuple[Tensor, list[Tensor]]:
    """The step y = ReLU(x + gate * norm2(conv2(ReLU(norm1(conv1(x)))))).

    Args:
        x: (P + 1, C) rows.
        first: convolution 1, without bias, and its norm.
        second: convolution 2, without bias, and its norm.
        gate: (P,).
        layout: of the rows.
        stats: of the norms.

    Returns:
        (P + 1, C), the last row zero, and what `depth_backward` needs.
    """
    y = torch.empty_like(x)
    y[-1] = 0
    scale = gate[:, None].to(x.dtype)
    states = []
    for (start, stop), size, level in zip(layout.levels, layout.shapes, layout.maps(x), strict=True):
        bounds = _bounds(layout.batch, size)
        conv1 = _rows(F.conv2d(level, first.weight, padding=1))
        hidden, *norm1 = normalise(
            conv1, first.scale, first.shift, bounds, groups=first.groups, eps=first.eps, stats=stats, relu=True
        )
        conv2 = _rows(F.conv2d(_map(hidden, level), second.weight, padding=1))
        normal, *norm2 = normalise(
            conv2, second.scale, second.shift, bounds, groups=second.groups, eps=second.eps, stats=stats
        )
        torch.addcmul(x[start:stop], normal, scale[start:stop], out=y[start:stop]).relu_()
        states += [conv1, hidden, *norm1, conv2, normal, *norm2]
    return y, states


def depth_backward(
    grad: Tensor, x: Tensor, y: Tensor, first: ConvNorm, second: ConvNorm, gate: Tensor, layout: RowLayout,
    states: Sequence[Tensor], stats: Stats,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Gradients of `depth`: of x, of the gate, and of weight, scale and shift of both parts; `y` is its result."""
    of_x = torch.ops.aten.threshold_backward(grad, y, 0)
    of_x[-1] = 0
    of_gate = torch.empty_like(gate)
    scale = gate[:, None].to(x.dtype)
    sums: list[Tensor] = []
    maps, grads = layout.maps(x), layout.maps(of_x)
    for number, ((start, stop), size) in enumerate(zip(layout.levels, layout.shapes, strict=True)):
        conv1, hidden, mean1, rstd1, conv2, normal, mean2, rstd2 = states[_STATES * number : _STATES * (number + 1)]
        bounds, level, part = _bounds(layout.batch, size), maps[number], of_x[start:stop]
        of_gate[start:stop] = (part * normal).sum(1)
        of_conv2, *of_norm2 = normalise_backward(
            part * scale[start:stop], conv2, second.scale, mean2, rstd2, bounds, groups=second.groups, stats=stats
        )
        of_hidden, of_weight2 = _conv_backward(_map(of_conv2, level), _map(hidden, level), second.weight)
        of_conv1, *of_norm1 = normalise_backward(
            torch.ops.aten.threshold_backward(_rows(of_hidden), hidden, 0), conv1, first.scale, mean1, rstd1, bounds,
            groups=first.groups, stats=stats,
        )  # fmt: skip
        of_level, of_weight1 = _conv_backward(_map(of_conv1, level), level, first.weight)
        grads[number].add_(of_level)
        parts = [of_weight1, *of_norm1, of_weight2, *of_norm2]
        sums = [total + value for total, value in zip(sums, parts, strict=True)] if sums else parts
    return of_x, of_gate, sums


def _conv_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
    )
    return of_x, of_weight


def _bounds(batch: int, size: tuple[int, int]) -> list[int]:
    """First row of every image of a level, then their number."""
    return [image * size[0] * size[1] for image in range(batch + 1)]


def _rows(level: Tensor) -> Tensor:
    """(B, C, H, W) -> (B H W, C), a view when channels-last."""
    return level.permute(0, 2, 3, 1).reshape(-1, level.shape[1])


def _map(rows: Tensor, like: Tensor) -> Tensor:
    """(B H W, C) -> (B, C, H, W) of the size of `like`, channels-last."""
    batch, _, height, width = like.shape
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)
