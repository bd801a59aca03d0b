"""What a level sends to a neighbour, in plain torch: depthwise convolution, gated GroupNorm, resampling.

Levels go one by one, those with nothing to send not at all, and every result is added where it belongs: small maps
spend more time on passes over memory than on multiply-adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dyndet.ops.sparse.execute.norm import Stats, normalise, normalise_backward
from dyndet.ops.sparse.parameters import ConvNorm


@dataclass(frozen=True)
class Shipment:
    """What one level sends.

    Attributes:
        level: the sender.
        receiver: the level that gets it.
        rows: its rows in the plan.
        index: int64 (n,), their places among the positions of the level; None where they are all of them.
        bounds: first row of every image, then their number.
    """

    level: int
    receiver: int
    rows: slice
    index: Tensor | None
    bounds: list[int]


def send(
    maps: Sequence[Tensor], path: ConvNorm, gate: Tensor, shipment: Shipment, sums: Sequence[Tensor], factor: float,
    stats: Stats,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Adds `factor` times what arrives to the receiver.

    Args:
        maps: L x (B, C, H, W), the inputs of all levels.
        path: depthwise convolution and norm.
        gate: (n,) of the rows.
        shipment: from where to where.
        sums: L x (B, C, H, W), what the receiver's is added to in place.
        factor: weight of what arrives.
        stats: of the norm.

    Returns:
        (n, C) rows of the convolution and normalised, mean and 1 / deviation.
    """
    x, target = maps[shipment.level], sums[shipment.receiver]
    rows = _take(F.conv2d(x, path.weight, path.bias, padding=1, groups=x.shape[1]), shipment.index)
    normal, mean, rstd = normalise(
        rows, path.scale, path.shift, shipment.bounds, groups=path.groups, eps=path.eps, stats=stats
    )
    sent = _put(normal * gate[:, None].to(x.dtype), shipment.index, x)
    target.add_(torch.ops.aten.upsample_bilinear2d(sent, list(target.shape[-2:]), True), alpha=factor)
    return rows, normal, mean, rstd


def send_backward(
    grads: Sequence[Tensor], maps: Sequence[Tensor], path: ConvNorm, gate: Tensor, shipment: Shipment,
    states: Sequence[Tensor], sums: Sequence[Tensor], factor: float, stats: Stats,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `send`; that of the sender's map is added to its `sums` in place.

    Args:
        grads: L x (B, C, H, W), of the sums.
        states: what `send` returned.

    Returns:
        Gradients of weight, bias, scale, shift, gate (n,) and factor.
    """
    rows, normal, mean, rstd = states
    x, grad = maps[shipment.level], grads[shipment.receiver]
    of_sent = torch.ops.aten.upsample_bilinear2d_backward(grad, list(grad.shape[-2:]), list(x.shape), True)
    part = _take(of_sent, shipment.index)
    of_gate = (part * normal).sum(1, dtype=gate.dtype)
    of_rows, of_scale, of_shift = normalise_backward(
        part * (gate * factor)[:, None].to(x.dtype), rows, path.scale, mean, rstd, shipment.bounds,
        groups=path.groups, stats=stats,
    )  # fmt: skip
    of_map, of_weight, _ = torch.ops.aten.convolution_backward(
        _put(of_rows, shipment.index, x), x, path.weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], x.shape[1],
        [True, True, False],
    )  # fmt: skip
    sums[shipment.level].add_(of_map)
    return of_weight, of_rows.sum(0), of_scale, of_shift, of_gate * factor, torch.dot(of_gate, gate)


def _take(level: Tensor, index: Tensor | None) -> Tensor:
    """(B, C, H, W) -> the rows (n, C) at the indices."""
    rows = level.permute(0, 2, 3, 1).reshape(-1, level.shape[1])
    return rows if index is None else rows.index_select(0, index)


def _put(rows: Tensor, index: Tensor | None, like: Tensor) -> Tensor:
    """Rows at their places in a map of `like`'s size, zero elsewhere."""
    batch, channels, height, width = like.shape
    if index is not None:
        rows = rows.new_zeros(batch * height * width, channels).index_copy_(0, index, rows)
    return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)
