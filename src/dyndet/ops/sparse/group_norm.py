"""GroupNorm of rows, differentiable, with an optional ReLU."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dyndet.layout import RowLayout
from dyndet.ops.sparse.backend import Impl, Stats, backend, resolve
from dyndet.ops.sparse.operator import operator
from dyndet.ops.sparse.plan import Plan


class Norm(NamedTuple):
    """A GroupNorm of rows.

    Attributes:
        scale: (C,).
        shift: (C,).
        groups: divides C.
        eps: added to the variance.
        stats: "active" takes statistics over the active positions of an image and level, as GroupNorm does over a map;
            "position" takes them at each position over the group's channels, so that they depend on no other.
    """

    scale: Tensor
    shift: Tensor
    groups: int
    eps: float = 1e-5
    stats: Stats = "active"

    @classmethod
    def of(cls, norm: nn.GroupNorm, stats: Stats) -> Norm:
        return cls(norm.weight, norm.bias, norm.num_groups, norm.eps, stats)


def group_norm(x: Tensor, norm: Norm, *, plan: Plan, relu: bool = False, impl: Impl = "auto") -> Tensor:
    """GroupNorm whose statistics come from active rows alone; computed in float32.

    Args:
        x: (capacity + 1, C).
        norm: of the rows.
        plan: of the rows.
        relu: clips the result at 0.
        impl: execution.

    Returns:
        (capacity + 1, C) in the type of `x`; rows from the plan's count on are undefined.
    """
    how = resolve(impl, x.device)
    plan.check(how)
    scale, shift, *rest = norm
    return _group_norm(x, scale, shift, plan.tensors, plan.layout.sizes, *rest, relu, how)[0]


def _forward(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    plan: list[Tensor],
    sizes: list[int],
    groups: int,
    eps: float,
    stats: str,
    relu: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised rows, mean, 1 / deviation."""
    active = Plan.of(plan, RowLayout.from_sizes(sizes, x.device))
    return backend(impl).group_norm(x, Norm(scale, shift, groups, eps, stats), active, relu)  # type: ignore[arg-type]


def _fake(x: Tensor, scale: Tensor, shift: Tensor, plan: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    sizes, groups, _, stats, *_ = rest
    return torch.empty_like(x), *empty_statistics(x, sizes, groups, stats)


def empty_statistics(x: Tensor, sizes: list[int], groups: int, stats: str) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation: (capacity, groups) by position, else (S, groups)."""
    rows = len(x) - 1 if stats == "position" else RowLayout.from_sizes(sizes, x.device).segments
    mean = x.new_empty(rows, groups, dtype=torch.promote_types(x.dtype, torch.float32))
    return mean, torch.empty_like(mean)


def _backward(grad: Tensor, needs: list[bool], outputs: list[Tensor], x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    scale, shift, plan, sizes, groups, eps, stats, relu, impl = rest
    y, *statistics = outputs
    active = Plan.of(plan, RowLayout.from_sizes(sizes, x.device))
    norm = Norm(scale, shift, groups, eps, stats)
    return backend(impl).group_norm_backward(grad, x, y if relu else None, norm, *statistics, active)


_group_norm = operator("group_norm", _forward, _fake, _backward, inputs=3)
