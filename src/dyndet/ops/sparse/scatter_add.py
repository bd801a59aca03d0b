"""From rows back to the map: normalise, gate, add to the residual, clip; one pass, differentiable.

y[p] = act( residual[p] + gate[p] * norm(x[row of p]) )   where p is active
y[p] = act( residual[p] )                                 elsewhere; 0 without a residual
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyndet.ops.sparse.backend import Impl, resolve
from dyndet.ops.sparse.group_norm import PLAN_AND_NORM, Norm, fake_norm, parse_norm
from dyndet.ops.sparse.operator import operator
from dyndet.ops.sparse.plan import Plan


def scatter_add(
    x: Tensor,
    norm: Norm,
    gate: Tensor,
    *,
    residual: Tensor | None = None,
    plan: Plan,
    relu: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Gated GroupNorm of rows, added to the map where they belong.

    Args:
        x: (capacity + 1, C), not yet normalised.
        norm: of the rows, see `group_norm`.
        gate: (P,) what the normalised rows are multiplied by.
        residual: (P + 1, C) what they are added to, or None.
        plan: of the rows.
        relu: clips the sum at 0.
        impl: execution.

    Returns:
        (P + 1, C), the last row zero, in the type of `x` (of the residual, where there is one).
    """
    how = resolve(impl, x.device)
    plan.check(how)
    gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
    scale, shift, *rest = norm
    residual = None if residual is None else residual.contiguous()
    return _scatter_add(
        x.contiguous(), scale, shift, gate, residual, plan.tensors, plan.layout.sizes, *rest, relu, how
    )[0]


def _parse(x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor, residual: Tensor | None, *rest: Any) -> Any:
    return *parse_norm(x, scale, shift, *rest), gate, residual


def _fake(x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor, residual: Tensor | None, *rest: Any) -> Any:
    like = x if residual is None else residual
    normal, *statistics = fake_norm(x, scale, shift, *rest)
    normal = x.new_empty(0) if rest[-1] == "triton" else normal
    return like.new_empty(len(gate) + 1, x.shape[1]), normal, *statistics


_scatter_add = operator(
    "scatter_add",
    f"Tensor x, Tensor scale, Tensor shift, Tensor gate, Tensor? residual, {PLAN_AND_NORM}",
    "(Tensor, Tensor, Tensor, Tensor)",  # map rows, normalised rows (kernels: none, taken again), statistics
    _parse,
    _fake,
    inputs=5,
    rereads="relu",
)
