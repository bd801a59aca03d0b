"""From rows back to the map: normalise, gate, add to the residual, clip; one pass, differentiable.

y[p] = act( residual[p] + gate[p] * norm(x[row of p]) )   where p is active
y[p] = act( residual[p] )                                 elsewhere; 0 without a residual
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyndet.layout import RowLayout
from dyndet.ops.sparse.backend import Impl, backend, resolve
from dyndet.ops.sparse.group_norm import Norm, empty_statistics
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
    return _scatter_add(x, scale, shift, gate, residual, plan.tensors, plan.layout.sizes, *rest, relu, how)[0]


def _forward(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    gate: Tensor,
    residual: Tensor | None,
    plan: list[Tensor],
    sizes: list[int],
    groups: int,
    eps: float,
    stats: str,
    relu: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Map rows, normalised rows (nothing where they are rather taken again), mean, 1 / deviation."""
    active = Plan.of(plan, RowLayout.from_sizes(sizes, x.device))
    norm = Norm(scale, shift, groups, eps, stats)  # type: ignore[arg-type]
    return backend(impl).scatter_add(x, norm, gate, residual, active, relu)


def _fake(x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor, residual: Tensor | None, *rest: Any) -> Any:
    _, sizes, groups, _, stats, _, impl = rest
    like = x if residual is None else residual
    normal = x.new_empty(0) if impl == "triton" else torch.empty_like(x)
    return like.new_empty(len(gate) + 1, x.shape[1]), normal, *empty_statistics(x, sizes, groups, stats)


def _backward(grad: Tensor, needs: list[bool], outputs: list[Tensor], x: Tensor, *rest: Any) -> tuple[Any, ...]:
    scale, shift, gate, residual, plan, sizes, groups, eps, stats, relu, impl = rest
    active = Plan.of(plan, RowLayout.from_sizes(sizes, x.device))
    norm = Norm(scale, shift, groups, eps, stats)
    return backend(impl).scatter_add_backward(grad, outputs, x, norm, gate, active, relu, residual is not None)


_scatter_add = operator("scatter_add", _forward, _fake, _backward, inputs=5)
