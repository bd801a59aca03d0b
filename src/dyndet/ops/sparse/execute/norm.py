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
    out = torch.empty_like(x)
    out[-1] = 0
    count = bounds[-1]
    _, mean, rstd = normalise(
        x[:count], weight, bias, bounds, groups=groups, eps=eps, stats=stats, relu=relu, out=out[:count]
    )
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
    _, grad_weight, grad_bias = normalise_backward(
        grad, x[:count], weight, mean, rstd, bounds, groups=groups, stats=stats, out=grad_x[:count]
    )
    return grad_x, grad_weight, grad_bias


def normalise(
    x: Tensor, weight: Tensor, bias: Tensor, bounds: Sequence[int], *, groups: int, eps: float, stats: Stats,
    relu: bool = False, out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`norm` of (rows, C) without a row for zero, written to `out` where there is one; `bounds` are the offsets."""
    if stats == "position":
        return _position_norm(x, weight, bias, groups, eps, relu, out)
    y, mean, rstd = _segment_norm(x, weight, bias, bounds, groups, eps, relu, out)
    if _far(mean, rstd):
        pivots = _pivots(x, bounds, groups)
        y, mean, rstd = _segment_norm(x, weight, bias, bounds, groups, eps, relu, out, pivots)
        mean = mean + pivots.mean(2)
    return y, mean, rstd


def normalise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, bounds: Sequence[int], *, groups: int,
    stats: Stats, out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `normalise` for x, written to `out` where there is one, weight and bias."""
    if stats == "position":
        return _position_backward(grad, x, weight, mean, rstd, out)
    pivots = None
    if _far(mean, rstd):
        pivots = _pivots(x, bounds, groups)
        mean = mean - pivots.mean(2)
    runs = _runs(bounds)
    if not runs:
        return _empty(x, out), torch.zeros_like(weight), torch.zeros_like(weight)
    scale, _ = _affine(x, weight, weight)
    mean, rstd = mean.to(scale.dtype), rstd.to(scale.dtype)
    out = _empty(x, out) if len(runs) > 1 else out
    of_affine: tuple[list[Tensor], list[Tensor]] = [], []
    for (first, number, start, length), part, of_part in zip(runs, _maps(x, runs), _maps(grad, runs), strict=True):
        segments = slice(first, first + number)
        if pivots is not None:
            part = part - pivots[segments].view(number, -1, 1, 1)
        of_x, *of_both = torch.ops.aten.native_group_norm_backward(
            of_part, part, mean[segments], rstd[segments], scale, number, x.shape[1], length, groups, [True] * 3
        )
        out = _written(_rows(of_x), out, start)
        for parts, value in zip(of_affine, of_both, strict=True):
            parts.append(value)
    of_weight, of_bias = (parts[0] if len(parts) == 1 else torch.stack(parts).sum(0) for parts in of_affine)
    return _empty(x, out), of_weight, of_bias


def _segment_norm(
    x: Tensor, weight: Tensor, bias: Tensor, bounds: Sequence[int], groups: int, eps: float, relu: bool,
    out: Tensor | None, pivots: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The normalised rows of every segment, mean (without pivot) and 1 / deviation."""
    runs, segments = _runs(bounds), len(bounds) - 1
    if not runs:
        mean, rstd = x.new_zeros(2, segments, groups, dtype=_wide(x)).unbind()
        return _empty(x, out), mean, rstd
    affine = _affine(x, weight, bias)
    out = _empty(x, out) if len(runs) > 1 else out
    means, rstds = [], []
    for (first, number, start, length), part in zip(runs, _maps(x, runs), strict=True):
        if pivots is not None:
            part = part - pivots[first : first + number].view(number, -1, 1, 1)
        y, mean, rstd = torch.native_group_norm(part, *affine, number, x.shape[1], length, groups, eps)
        out = _written(_rows(y), out, start, relu)
        means.append(mean)
        rstds.append(rstd)
    mean, rstd = (_of_segments(parts, runs, segments).to(_wide(x)) for parts in (means, rstds))
    return _empty(x, out), mean, rstd


def _empty(like: Tensor, out: Tensor | None) -> Tensor:
    return torch.empty_like(like) if out is None else out


def _written(values: Tensor, out: Tensor | None, start: int, relu: bool = False) -> Tensor:
    """Rows, clipped at 0 if so wanted, copied to `out` from the row `start` on, or without one themselves."""
    if out is None:
        return values.relu_() if relu else values
    rows = out[start : start + len(values)]
    if relu and values.dtype == out.dtype:
        torch.clamp_min(values, 0, out=rows)  # in one pass
    else:
        rows.copy_(values.relu_() if relu else values)
    return out


def _of_segments(parts: list[Tensor], runs: Sequence[Run], segments: int) -> Tensor:
    """Statistics of every run -> (S, groups), zero for segments without rows."""
    values = parts[0] if len(parts) == 1 else torch.cat(parts)
    if len(values) == segments:
        return values
    index = [segment for first, number, *_ in runs for segment in range(first, first + number)]
    return values.new_zeros(segments, values.shape[1]).index_copy_(0, torch.tensor(index, device=values.device), values)


def _far(mean: Tensor, rstd: Tensor) -> bool:
    """Whether a mean lies so many deviations from 0 that torch's channels-last GroupNorm loses digits."""
    return mean.numel() > 0 and float(torch.linalg.vector_norm(mean * rstd, float("inf"))) > 10


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
    """Every run as (segments, C, n, 1): a channels-last view, or what GroupNorm takes elsewhere than on the CPU."""
    rows = rows.contiguous()
    channels, start = rows.shape[1], rows.storage_offset()
    maps = [
        rows.as_strided(
            (number, channels, length, 1), (length * channels, 1, channels, channels), start + first * channels
        )
        for _, number, first, length in runs
    ]
    return maps if rows.device.type == "cpu" else [part.contiguous() for part in maps]


def _rows(maps: Tensor) -> Tensor:
    """(segments, C, n, 1) -> (rows, C), a view when channels-last."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def _position_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, relu: bool, out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised (rows, C), mean and 1 / deviation, (rows, groups)."""
    parts = _parts(x.to(_wide(x)), groups)
    normal, mean, rstd = torch.native_layer_norm(parts, parts.shape[1:], None, None, eps)
    normal = normal.view(x.shape)
    into = normal if out is None or out.dtype != normal.dtype else out
    torch.mul(normal, weight.to(normal.dtype), out=into).add_(bias.to(normal.dtype))
    into = into.relu_() if relu else into
    if out is None:
        out = into.to(x.dtype)
    elif out is not into:
        out.copy_(into)
    return out, mean.view(-1, groups), rstd.view(-1, groups)


def _position_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    groups = mean.shape[1]
    parts, grads = _parts(x.to(mean.dtype), groups), grad.to(mean.dtype)
    mean, rstd = mean.view(-1, 1), rstd.view(-1, 1)
    of_x, _, _ = torch.ops.aten.native_layer_norm_backward(
        _parts(grads * weight.to(grads.dtype), groups), parts, parts.shape[1:], mean, rstd, None, None,
        [True, False, False],
    )  # fmt: skip
    of_x = of_x.view(x.shape).to(x.dtype)
    normal = (parts - mean).mul_(rstd).view(x.shape)
    return of_x if out is None else out.copy_(of_x), normal.mul_(grads).sum(0), grads.sum(0)


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
