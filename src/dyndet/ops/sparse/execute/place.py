"""Gated GroupNorm of rows added to a map, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from dyndet.ops.sparse.execute.norm import Stats, norm, norm_backward


def place(
    x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, residual: Tensor | None, positions: Tensor,
    offsets: Tensor, *, groups: int, eps: float, stats: Stats, relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `place_rows`; returns the map's rows, the normalised rows, and mean and 1 / deviation of the norm."""
    normal, mean, rstd = norm(x, weight, bias, offsets, groups=groups, eps=eps, stats=stats, relu=False)
    count = int(offsets[-1])
    like = x if residual is None else residual
    y = like.new_empty(len(gate) + 1, x.shape[1])
    if count == len(gate):  # the whole map: one pass, no indices
        rows, scale = normal[:-1].to(like.dtype), gate[:, None].to(like.dtype)
        if residual is None:
            torch.mul(rows, scale, out=y[:-1])
        else:
            torch.addcmul(residual[:-1], rows, scale, out=y[:-1])
        y = y.relu_() if relu else y
    else:
        active = positions[:count]
        rows = (normal[:count] * gate.index_select(0, active)[:, None].to(x.dtype)).to(like.dtype)
        if residual is None:
            y.zero_()
        else:
            rows.add_(residual.index_select(0, active))
            y = residual.relu() if relu else residual.clone()
        y.index_copy_(0, active.long(), rows.relu_() if relu else rows)
    y[-1] = 0
    return y, normal, mean, rstd


def place_backward(
    grad: Tensor, y: Tensor | None, x: Tensor, normal: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    gate: Tensor, positions: Tensor, offsets: Tensor, *, groups: int, stats: Stats, residual: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `place` for the residual, x, weight, bias and gate; `y` is its result where it was clipped at 0."""
    count = int(offsets[-1])
    if y is not None:
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    elif residual:
        grad = grad.clone()  # an operator must not return what it was given
    whole = count == len(gate)
    active = positions[:count]
    part = (grad[:count] if whole else grad.index_select(0, active)).to(x.dtype)
    opened = gate if whole else gate.index_select(0, active)
    grad_x, grad_weight, grad_bias = norm_backward(
        part * opened[:, None].to(x.dtype), x, None, weight, mean, rstd, offsets, groups=groups, stats=stats
    )
    of_gate = (part * normal[:count]).sum(1).to(gate.dtype)
    grad_gate = of_gate if whole else torch.zeros_like(gate).index_copy_(0, active.long(), of_gate)
    return grad if residual else None, grad_x, grad_weight, grad_bias, grad_gate
