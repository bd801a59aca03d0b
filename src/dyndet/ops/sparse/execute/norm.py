"""GroupNorm of rows in plain torch, over the active rows of a segment or at each position by itself.

Rows of a segment are consecutive and channels-last, so torch's own GroupNorm serves them as a (1, C, n, 1) map; equal
neighbours (all of a level, when every position is active) go in one call. The statistics of a position are those of a
layer norm over the C / groups channels of each of its groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Literal

import torch
from torch import Tensor

Stats = Literal["active", "position"]


def norm(
    x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, *, groups: int, eps: float, stats: Stats, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises rows.

    Args:
        x: (capacity + 1, C).
        weight: (C,) scale.
        bias: (C,) shift.
        offsets: int32 (S + 1,), first row of every segment.
        groups: divides C.
        eps: added to the variance.
        stats: "active" takes them over a segment's rows, "position" over each row alone.
        relu: clips the result at 0.

    Returns:
        (capacity + 1, C) with a last row of zeros, and mean and 1 / deviation, at least float32: (S, groups), or
        (rows, groups).
    """
    bounds = offsets.tolist()
    count = bounds[-1]
    out = torch.empty_like(x)
    out[-1] = 0
    if stats == "position":
        mean, rstd = _position_norm(x[:count], weight, bias, groups, eps, relu, out[:count])
    else:
        mean, rstd = _segment_norm(x, weight, bias, bounds, groups, eps, relu, out)
        if _far(mean, rstd):
            pivots = _pivots(x, bounds, groups)
            mean, rstd = _segment_norm(x, weight, bias, bounds, groups, eps, relu, out, pivots)
            mean += pivots.mean(2)
    return out, mean, rstd


def norm_backward(
    grad: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor, offsets: Tensor, *,
    groups: int, stats: Stats,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `norm` for x, weight and bias; `y` is its result where it was clipped at 0."""
    bounds = offsets.tolist()
    count = bounds[-1]
    grad = grad[:count] if y is None else torch.ops.aten.threshold_backward(grad[:count], y[:count], 0)
    grad_x = torch.empty_like(x)
    grad_x[-1] = 0
    if stats == "position":
        grad_weight, grad_bias = _position_backward(grad, x[:count], weight, mean, rstd, grad_x[:count])
        return grad_x, grad_weight, grad_bias
    pivots = None
    if _far(mean, rstd):
        pivots = _pivots(x, bounds, groups)
        mean = mean - pivots.mean(2)
    runs = _runs(bounds)
    scale, _ = _affine(x, weight, weight)
    mean, rstd = mean.to(scale.dtype), rstd.to(scale.dtype)
    of_affine: list[list[Tensor]] = [[], []]
    for (first, number, _, _), part, of_part, into in zip(
        runs, _maps(x, runs), _maps(grad, runs), _maps(grad_x, runs), strict=True
    ):
        images, channels, length, _ = part.shape
        segments = slice(first, first + number)
        if pivots is not None:
            part = part - pivots[segments].view(number, channels, 1, 1)
        of_x, *of_both = torch.ops.aten.native_group_norm_backward(
            of_part, part, mean[segments], rstd[segments], scale, images, channels, length, groups, [True] * 3
        )
        into.copy_(of_x)
        for parts, value in zip(of_affine, of_both, strict=True):
            parts.append(value)
    grad_weight, grad_bias = (torch.stack(parts).sum(0) if parts else torch.zeros_like(weight) for parts in of_affine)
    return grad_x, grad_weight, grad_bias


def _segment_norm(
    x: Tensor, weight: Tensor, bias: Tensor, bounds: Sequence[int], groups: int, eps: float, relu: bool,
    out: Tensor, pivots: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Writes the normalised rows of every segment to `out`; returns mean (without pivot) and 1 / deviation."""
    runs = _runs(bounds)
    affine = _affine(x, weight, bias)
    mean, rstd = x.new_zeros(2, len(bounds) - 1, groups, dtype=_wide(x)).unbind()
    for (first, number, _, _), part, into in zip(runs, _maps(x, runs), _maps(out, runs), strict=True):
        images, channels, length, _ = part.shape
        segments = slice(first, first + number)
        if pivots is not None:
            part = part - pivots[segments].view(number, channels, 1, 1)
        y, mean[segments], rstd[segments] = torch.native_group_norm(
            part, *affine, images, channels, length, groups, eps
        )
        _write(y, into, relu)
    return mean, rstd.clone()


def _write(values: Tensor, out: Tensor, relu: bool) -> None:
    """Copies, and clips at 0 in the same pass."""
    if relu and values.dtype == out.dtype:
        torch.clamp_min(values, 0, out=out)
    elif values is not out:
        out.copy_(values.relu_() if relu else values)


def _far(mean: Tensor, rstd: Tensor) -> bool:
    """Whether a mean lies so many deviations from 0 that torch's channels-last GroupNorm loses digits."""
    return mean.numel() > 0 and bool((mean * rstd).abs().max() > 10)


def _pivots(x: Tensor, bounds: Sequence[int], groups: int) -> Tensor:
    """(S, groups, C / groups): the mean of each group in the first row of every segment, to be taken off first."""
    first = x[[min(start, len(x) - 1) for start in bounds[:-1]]].view(len(bounds) - 1, groups, -1)
    return first.mean(2, keepdim=True).expand_as(first).contiguous()


Run = tuple[int, int, int, int]
"""First segment, number of segments, first row, rows per segment; never empty."""


def _runs(bounds: Sequence[int]) -> list[Run]:
    """Neighbouring segments of equal length, together."""
    runs = []
    segment = 0
    lengths = [stop - start for start, stop in pairwise(bounds)]
    for length, equal in groupby(lengths):
        number = len(list(equal))
        if length:
            runs.append((segment, number, bounds[segment], length))
        segment += number
    return runs


def _maps(rows: Tensor, runs: Sequence[Run]) -> list[Tensor]:
    """Every run as a channels-last (segments, C, n, 1) view."""
    rows = rows.contiguous()
    channels = rows.shape[1]
    return [
        rows.as_strided((number, channels, length, 1), (length * channels, 1, channels, channels), start * channels)
        for _, number, start, length in runs
    ]


def _position_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, relu: bool, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes the normalised (rows, C) to `out`; returns mean and 1 / deviation, (rows, groups)."""
    parts = _parts(x.to(_wide(x)), groups)
    normal, mean, rstd = torch.native_layer_norm(parts, parts.shape[1:], None, None, eps)
    scaled = torch.mul(normal.view(x.shape), weight.to(normal.dtype), out=out if out.dtype == normal.dtype else None)
    _write(scaled.add_(bias.to(normal.dtype)), out, relu)
    return mean.view(-1, groups), rstd.view(-1, groups)


def _position_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes the gradient of x to `out`; returns those of weight and bias."""
    groups = mean.shape[1]
    parts, grads = _parts(x.to(mean.dtype), groups), grad.to(mean.dtype)
    mean, rstd = mean.view(-1, 1), rstd.view(-1, 1)
    of_x, _, _ = torch.ops.aten.native_layer_norm_backward(
        _parts(grads * weight.to(grads.dtype), groups), parts, parts.shape[1:], mean, rstd, None, None,
        [True, False, False],
    )  # fmt: skip
    out.copy_(of_x.view(x.shape))
    normal = (parts - mean).mul_(rstd).view(x.shape)
    return normal.mul_(grads).sum(0), grads.sum(0)


def _parts(x: Tensor, groups: int) -> Tensor:
    """(rows, C) -> (rows x groups, C / groups)."""
    return x.reshape(len(x) * groups, x.shape[1] // groups)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift in a type that torch's GroupNorm takes beside the features: float32 on the CPU, else theirs."""
    if x.device.type == "cpu" and weight.dtype == torch.float32:
        return weight, bias
    return weight.to(x.dtype), bias.to(x.dtype)
