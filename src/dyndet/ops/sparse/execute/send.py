"""What a level sends to a neighbour, in plain torch: depthwise convolution, gated GroupNorm, resampling.

Levels go one by one, those with nothing to send not at all, and every result is added where it belongs: small maps
spend more time on passes over memory than on multiply-adds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dyndet.ops.sparse.execute.norm import Stats, norm, norm_backward
from dyndet.ops.sparse.layout import RowLayout


@dataclass(frozen=True)
class Route:
    """Where rows of a plan are sent.

    Attributes:
        layout: of the map.
        positions: int32 (capacity,), see `Plan`.
        bounds: first row of every segment, then the number of rows.
        step: what a level's index and its receiver's differ by.
    """

    layout: RowLayout
    positions: Tensor
    bounds: Sequence[int]
    step: int

    @property
    def computed(self) -> int:
        """Positions that the convolution computes: all of every level with rows and a receiver."""
        bounds = self.layout.levels
        return sum(bounds[level][1] - bounds[level][0] for level, _, _ in self.levels())

    def levels(self) -> Iterator[tuple[int, slice, Tensor | None]]:
        """Every level with rows and a receiver: its index, its rows, their indices in the level; None for all."""
        batch = self.layout.batch
        for level, (start, stop) in enumerate(self.layout.levels):
            rows = slice(self.bounds[level * batch], self.bounds[(level + 1) * batch])
            number = rows.stop - rows.start
            if number and 0 <= level + self.step < len(self.layout.shapes):
                yield level, rows, None if number == stop - start else self.positions[rows] - start


def send(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, gate: Tensor, route: Route, *,
    groups: int, eps: float, stats: Stats, offsets: Tensor, into: Tensor, factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Adds `factor` times what arrives to `into`.

    Args:
        x: (P + 1, C) rows of the map.
        weight: (C, 1, 3, 3).
        bias: (C,) or None.
        scale: (C,) of the norm.
        shift: (C,) of the norm.
        gate: (capacity,) of the rows.
        route: from where to where.
        groups: of the norm.
        eps: of the norm.
        stats: of the norm.
        offsets: int32 (S + 1,), see `Plan`.
        into: (P + 1, C).
        factor: weight of what arrives.

    Returns:
        (capacity + 1, C) rows of the convolution and normalised, mean and 1 / deviation.
    """
    layout = route.layout
    maps, received = layout.maps(x), layout.maps(into)
    rows = x.new_zeros(len(route.positions) + 1, x.shape[1])
    for level, place, index in route.levels():
        dense = F.conv2d(maps[level], weight, bias, padding=1, groups=x.shape[1])
        _take(dense, index, rows[place])
    normal, mean, rstd = norm(rows, scale, shift, offsets, groups=groups, eps=eps, stats=stats, relu=False)
    gated = normal[:-1] * gate[:, None].to(x.dtype)
    for level, place, index in route.levels():
        target = received[level + route.step]
        sent = _put(gated[place], index, maps[level])
        target.add_(torch.ops.aten.upsample_bilinear2d(sent, list(target.shape[-2:]), True), alpha=factor)
    return rows, normal, mean, rstd


def send_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, gate: Tensor, rows: Tensor, normal: Tensor, mean: Tensor,
    rstd: Tensor, route: Route, *, groups: int, stats: Stats, offsets: Tensor, into: Tensor, factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `send`; that of `x` is added to `into`.

    Returns:
        Gradients of weight, bias, scale, shift, gate (capacity,) and factor.
    """
    layout, channels = route.layout, x.shape[1]
    maps, sums, grads = layout.maps(x), layout.maps(into), layout.maps(grad)
    part = x.new_zeros(rows.shape)
    for level, place, index in route.levels():
        received = grads[level + route.step]
        of_sent = torch.ops.aten.upsample_bilinear2d_backward(
            received, list(received.shape[-2:]), list(maps[level].shape), True
        )
        _take(of_sent, index, part[place])
    of_gate = (part[:-1] * normal[:-1]).sum(1, dtype=gate.dtype)
    of_factor = torch.dot(of_gate, gate)
    part[:-1] *= (gate * factor)[:, None].to(x.dtype)
    of_rows, of_scale, of_shift = norm_backward(
        part, rows, None, scale, mean, rstd, offsets, groups=groups, stats=stats
    )
    of_weight = torch.zeros_like(weight)
    for level, place, index in route.levels():
        of_map, of_taps, _ = torch.ops.aten.convolution_backward(
            _put(of_rows[place], index, maps[level]), maps[level], weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0],
            channels, [True, True, False],
        )  # fmt: skip
        sums[level].add_(of_map)
        of_weight += of_taps
    return of_weight, of_rows[:-1].sum(0), of_scale, of_shift, of_gate * factor, of_factor


def _take(level: Tensor, index: Tensor | None, out: Tensor) -> None:
    """(B, C, H, W) at the indices, (n, C)."""
    rows = level.permute(0, 2, 3, 1).reshape(-1, level.shape[1])
    if index is None:
        out.copy_(rows)
    else:
        torch.index_select(rows, 0, index, out=out)


def _put(rows: Tensor, index: Tensor | None, like: Tensor) -> Tensor:
    """Rows at their places in a map of `like`'s size, zero elsewhere."""
    batch, channels, height, width = like.shape
    if index is not None:
        rows = rows.new_zeros(batch * height * width, channels).index_copy_(0, index.long(), rows)
    return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)
