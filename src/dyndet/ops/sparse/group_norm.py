"""GroupNorm of rows, differentiable, with an optional ReLU."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dyndet.layout import RowLayout
from dyndet.ops.sparse.backend import Impl, Stats, resolve
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
    return _group_norm(x.contiguous(), scale, shift, plan.tensors, plan.layout.sizes, *rest, relu, how)[0]


class RowNorm(NamedTuple):
    """A norm of the rows of a plan, as back ends take it."""

    norm: Norm
    plan: Plan
    relu: bool


def parse_norm(x: Tensor, scale: Tensor, shift: Tensor, plan: list[Tensor], *rest: Any) -> tuple[Tensor, RowNorm]:
    """The arguments of the operator as a back end takes them."""
    sizes, groups, eps, stats, relu, _ = rest
    layout = RowLayout.from_sizes(sizes, x.device)
    return x, RowNorm(Norm(scale, shift, groups, eps, stats), Plan.of(plan, layout), relu)


def fake_norm(x: Tensor, scale: Tensor, shift: Tensor, plan: list[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    """What the operator returns, without values."""
    sizes, groups, _, stats, *_ = rest
    return torch.empty_like(x), *empty_statistics(x, RowLayout.from_sizes(sizes, x.device), groups, stats)


def empty_statistics(x: Tensor, layout: RowLayout, groups: int, stats: str) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation: (capacity, groups) by position, else (S, groups)."""
    rows = len(x) - 1 if stats == "position" else layout.segments
    mean = x.new_empty(rows, groups, dtype=torch.promote_types(x.dtype, torch.float32))
    return mean, torch.empty_like(mean)


PLAN_AND_NORM = "Tensor[] plan, SymInt[] sizes, int groups, float eps, str stats, bool relu, str impl"
_group_norm = operator(
    "group_norm",
    f"Tensor x, Tensor scale, Tensor shift, {PLAN_AND_NORM}",
    "(Tensor, Tensor, Tensor)",  # normalised rows, mean, 1 / deviation
    parse_norm,
    fake_norm,
    inputs=3,
    rereads="relu",
)
