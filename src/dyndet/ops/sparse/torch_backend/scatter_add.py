"""Gated GroupNorm of rows added to a map, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dyndet.ops.sparse.group_norm import Norm
from dyndet.ops.sparse.plan import Plan
from dyndet.ops.sparse.torch_backend.group_norm import group_norm, group_norm_backward


def scatter_add(
    x: Tensor, norm: Norm, gate: Tensor, residual: Tensor | None, plan: Plan, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `dyndet.ops.sparse.scatter_add`; rows of the map, the normalised rows, mean and 1 / deviation."""
    normal, mean, rstd = group_norm(x, norm, plan, relu=False)
    like = x if residual is None else residual
    y = like.new_empty(len(gate) + 1, x.shape[1])
    if plan.whole:  # one pass, no indices
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
            y.zero_()
        else:
            rows.add_(residual.index_select(0, active))
            y = residual.relu() if relu else residual.clone()
        y.index_copy_(0, active, rows.relu_() if relu else rows)
    y[-1] = 0
    return y, normal, mean, rstd


def scatter_add_backward(
    grad: Tensor, outputs: Sequence[Tensor], x: Tensor, norm: Norm, gate: Tensor, plan: Plan, relu: bool, residual: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of x, scale, shift, gate and the residual, from the `outputs` of `scatter_add`."""
    y, normal, mean, rstd = outputs
    if relu:
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    elif residual:
        grad = grad.clone()  # an operator must not return what it was given
    active = None if plan.whole else plan.positions[: plan.rows].long()
    part = (grad[:-1] if active is None else grad.index_select(0, active)).to(x.dtype)
    opened = gate if active is None else gate.index_select(0, active)
    grads = group_norm_backward(part * opened[:, None].to(x.dtype), x, None, norm, mean, rstd, plan)
    grad_gate = (part * normal[: len(part)]).sum(1).to(gate.dtype)
    if active is not None:
        grad_gate = torch.zeros_like(gate).index_copy_(0, active, grad_gate)
    return *grads, grad_gate, grad if residual else None
