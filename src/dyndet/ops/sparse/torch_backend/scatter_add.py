"""Gated GroupNorm of rows added to a map, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dyndet.ops.sparse.group_norm import RowNorm
from dyndet.ops.sparse.operator import Gradients
from dyndet.ops.sparse.torch_backend.group_norm import group_norm, group_norm_backward


def scatter_add(
    x: Tensor, how: RowNorm, gate: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `dyndet.ops.sparse.scatter_add`; rows of the map, the normalised rows, mean and 1 / deviation."""
    plan, relu = how.plan, how.relu
    normal, mean, rstd = group_norm(x, how._replace(relu=False))
    like = x if residual is None else residual
    if plan.whole:  # one pass, no indices
        y = like.new_empty(len(gate) + 1, x.shape[1])
        rows, factor = normal[:-1].to(like.dtype), gate[:, None].to(like.dtype)
        if residual is None:
            torch.mul(rows, factor, out=y[:-1])
        else:
            torch.addcmul(residual[:-1], rows, factor, out=y[:-1])
        y = y.relu_() if relu else y
    else:
        active = plan.positions[: plan.rows].long()
        rows = (normal[: len(active)] * gate.index_select(0, active)[:, None].to(x.dtype)).to(like.dtype)
        if residual is None:
            y = like.new_zeros(len(gate) + 1, x.shape[1])
        else:
            rows.add_(residual.index_select(0, active))
            y = residual.relu() if relu else residual.clone()
        y.index_copy_(0, active, rows.relu_() if relu else rows)
    y[-1] = 0
    return y, normal, mean, rstd


def scatter_add_backward(
    grad: Tensor, needs: Any, outputs: Sequence[Tensor], x: Tensor, how: RowNorm, gate: Tensor, residual: Tensor | None
) -> Gradients:
    """Gradients of x, scale, shift, gate and the residual."""
    plan = how.plan
    y, normal, *_ = outputs
    if how.relu:
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    elif residual is not None:
        grad = grad.clone()  # an operator must not return what it was given
    active = None if plan.whole else plan.positions[: plan.rows].long()
    part = (grad[:-1] if active is None else grad.index_select(0, active)).to(x.dtype)
    opened = gate if active is None else gate.index_select(0, active)
    of_rows = part * opened[:, None].to(x.dtype)
    grads = group_norm_backward(of_rows, needs, outputs[1:], x, how._replace(relu=False))
    grad_gate = (part * normal[: len(part)]).sum(1).to(gate.dtype)
    if active is not None:
        grad_gate = torch.zeros_like(gate).index_copy_(0, active, grad_gate)
    return *grads, grad_gate, None if residual is None else grad
