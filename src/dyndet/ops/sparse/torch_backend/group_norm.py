"""GroupNorm of rows in plain torch.

Rows of a segment are consecutive and channels-last, so torch's own GroupNorm serves n of them as a (1, C, n, 1) map;
equal neighbours (all of a level, when every position is active) go in one call. With statistics by position every row
is a segment of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from dyndet.ops.sparse.group_norm import Norm, RowNorm, empty_statistics
from dyndet.ops.sparse.operator import Gradients
from dyndet.ops.sparse.plan import Plan

Run = tuple[slice, slice, int]
"""Neighbouring segments of equal length, their rows, and how many segments they are."""


def group_norm(x: Tensor, how: RowNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises rows.

    Returns:
        (capacity + 1, C) with a last row of zeros, and mean and 1 / deviation, at least float32: (S, groups), zero
        where a segment has no rows, or by position (capacity, groups).
    """
    norm, plan, relu = how
    out = torch.empty_like(x)
    out[-1] = 0
    mean, rstd = (value.zero_() for value in empty_statistics(x, plan.layout, norm.groups, norm.stats))
    affine, runs = _affine(x, norm), _runs(plan, norm)
    for pivoted in (False, True):
        for segments, rows, number in runs:
            values, pivot = _pivoted(x[rows], number, norm.groups) if pivoted else (x[rows], 0)
            size = number, x.shape[1], (rows.stop - rows.start) // number, norm.groups
            y, centre, rstd[segments] = torch.native_group_norm(_maps(values, number), *affine, *size, norm.eps)
            mean[segments] = centre + pivot
            if relu and y.dtype == out.dtype:
                torch.clamp_min(_rows(y), 0, out=out[rows])  # in one pass
            else:
                out[rows] = _rows(y).relu_() if relu else _rows(y)
        if not _far(mean, rstd):
            break
    return out, mean, rstd


def group_norm_backward(grad: Tensor, needs: Any, outputs: Sequence[Tensor], x: Tensor, how: RowNorm) -> Gradients:
    """Gradients of x, scale and shift."""
    norm, plan, relu = how
    y, mean, rstd = outputs
    runs, pivoted = _runs(plan, norm), _far(mean, rstd)
    if relu:
        grad = torch.ops.aten.threshold_backward(grad[: plan.rows], y[: plan.rows], 0)
    grad_x = torch.empty_like(x)
    grad_x[-1] = 0
    scale, _ = _affine(x, norm)
    mean, rstd = mean.to(scale.dtype), rstd.to(scale.dtype)
    of_scale, of_shift = torch.zeros_like(scale), torch.zeros_like(scale)
    for segments, rows, number in runs:
        values, pivot = _pivoted(x[rows], number, norm.groups) if pivoted else (x[rows], 0)
        size = number, x.shape[1], (rows.stop - rows.start) // number, norm.groups
        statistics = mean[segments] - pivot, rstd[segments]
        of_x, *of_affine = torch.ops.aten.native_group_norm_backward(
            _maps(grad[rows], number), _maps(values, number), *statistics, scale, *size, [True] * 3
        )
        grad_x[rows] = _rows(of_x)
        of_scale += of_affine[0]
        of_shift += of_affine[1]
    return grad_x, of_scale, of_shift


def _runs(plan: Plan, norm: Norm) -> list[Run]:
    """All segments that have rows."""
    if norm.stats == "position":
        return [(slice(0, plan.rows), slice(0, plan.rows), plan.rows)] if plan.rows else []
    runs: list[Run] = []
    bounds, segment = plan.offsets.tolist(), 0
    for length, equal in groupby(stop - start for start, stop in pairwise(bounds)):
        number = len(list(equal))
        if length:
            runs.append((slice(segment, segment + number), slice(bounds[segment], bounds[segment + number]), number))
        segment += number
    return runs


def _far(mean: Tensor, rstd: Tensor) -> bool:
    """Whether a mean lies so many deviations from 0 that torch's channels-last GroupNorm loses digits."""
    return mean.numel() > 0 and float(torch.linalg.vector_norm(mean * rstd, float("inf"))) > 10


def _pivoted(x: Tensor, segments: int, groups: int) -> tuple[Tensor, Tensor]:
    """(n, C) rows without the mean of each group in the first row of their segment; these, (segments, groups)."""
    values = x.view(segments, -1, groups, x.shape[1] // groups)
    pivot = values[:, :1].mean(3, keepdim=True)
    return (values - pivot).view(x.shape), pivot.view(segments, groups)


def _maps(rows: Tensor, segments: int) -> Tensor:
    """(n, C) -> (segments, C, n / segments, 1): a channels-last view on the CPU, else a copy that GroupNorm takes."""
    length, channels = len(rows) // segments, rows.shape[1]
    # Strides that say channels-last even where a side is 1.
    strides = length * channels, 1, channels, channels
    maps = rows.as_strided((segments, channels, length, 1), strides, rows.storage_offset())
    return maps if rows.is_cpu else maps.contiguous()


def _rows(maps: Tensor) -> Tensor:
    """(segments, C, n, 1) -> (rows, C), a view when channels-last."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def _affine(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Scale and shift in a type that torch's GroupNorm takes beside the features: float32 on the CPU, else theirs."""
    if x.is_cpu and norm.scale.dtype == torch.float32:
        return norm.scale, norm.shift
    return norm.scale.to(x.dtype), norm.shift.to(x.dtype)
