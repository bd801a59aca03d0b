"""3x3 convolution from the rows of one plan to the rows of another, differentiable.

    target[n] = bias + sum over taps t of  W[:, :, t] @ source[ row of (position of n + offset of t) ]

The source is the whole map (first convolution of a block, which reads everything) or the rows of another plan.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dyndet.layout import RowLayout
from dyndet.ops.sparse.backend import Impl, allows_tf32, autocast_dtype, backend, choose
from dyndet.ops.sparse.group_norm import Norm, RowNorm, group_norm
from dyndet.ops.sparse.operator import operator
from dyndet.ops.sparse.plan import Plan
from dyndet.routing import Work

Tensors = list[Tensor]


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    source: Plan,
    target: Plan,
    norm: Norm | None = None,
    relu: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Same-size, stride-1 3x3 convolution of rows; depthwise where the weight has one input channel.

    Args:
        x: (source capacity + 1, C), the last row standing for zero.
        weight: (O, C, 3, 3), or (C, 1, 3, 3) for a depthwise convolution.
        bias: (O,) or None.
        source: the plan of `x`.
        target: the rows to compute.
        norm: what follows, see `group_norm`; kernels take statistics of positions from their own tiles, in one launch,
            where no backward pass will follow.
        relu: clips what was normalised at 0.
        impl: execution; "auto" takes the fastest for the target's density.

    Returns:
        (target capacity + 1, O) in the type of `x` (of autocast, where it is on); rows from the target's count on are
        undefined.

    Raises:
        ValueError: on shapes that do not fit.
    """
    depthwise = weight.shape[1] == 1 and len(weight) == x.shape[1] > 1
    if weight.shape[1:] != (1 if depthwise else x.shape[1], 3, 3):
        raise ValueError(f"weight {tuple(weight.shape)} does not fit rows of {x.shape[1]} channels: (O, C, 3, 3)")
    if len(x) != source.capacity + 1:
        raise ValueError(f"x has {len(x)} rows, its plan {source.capacity} and one for zero")
    dtype = autocast_dtype(x)
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    how = _execution(impl, target, x, weight)
    for plan in (source, target):
        plan.check(how)
    tf32 = how == "triton" and allows_tf32(dtype)
    plans = source.tensors, target.tensors, target.layout.sizes, target.density, tf32, how
    one_launch = how == "triton" and bias is None and not depthwise and not torch.is_grad_enabled()
    if norm is not None and norm.stats == "position" and one_launch:
        return _conv_norm(x, weight, norm.scale, norm.shift, norm.groups, norm.eps, relu, *plans)
    rows = _conv(x, weight, bias, *plans)
    return rows if norm is None else group_norm(rows, norm, plan=target, relu=relu, impl=impl)


def conv_work(x: Tensor, weight: Tensor, *, target: Plan, impl: Impl = "auto") -> Work:
    """What `conv` with these arguments computes."""
    how = _execution(impl, target, x, weight)
    rows = target.capacity if target.exact else target.count
    tiled = how == "triton" and not x.is_meta
    tile = backend(how).tile_rows(x, weight, target, tf32=allows_tf32(x.dtype)) if tiled else 1
    return Work(float(weight.numel()), rows, tile, target.positions_reached() if how == "dense" else None)


def _execution(impl: Impl, target: Plan, x: Tensor, weight: Tensor) -> Impl:
    how = choose(impl, target.density, x.shape[1], x.dtype, x.device)
    # Nine multiply-adds per value of a depthwise convolution do not pay for gathering nine values.
    return "dense" if how == "gather" and weight.shape[1] < x.shape[1] else how


class Layer(NamedTuple):
    """A convolution as back ends take it: depthwise where the weight has one input channel."""

    weight: Tensor
    bias: Tensor | None
    source: Plan
    target: Plan
    tf32: bool
    impl: str


def _parse(x: Tensor, weight: Tensor, bias: Tensor | None, source: Tensors, *rest: Any) -> tuple[Tensor, Layer]:
    target, sizes, density, tf32, impl = rest
    layout = RowLayout.from_sizes(sizes, x.device)
    return x, Layer(weight, bias, Plan.of(source, layout), Plan.of(target, layout, density), tf32, impl)


def _fake(x: Tensor, weight: Tensor, _: Any, source: Tensors, target: Tensors, sizes: list[int], *__: Any) -> Tensor:
    rows = len(target[0]) if target else RowLayout.from_sizes(sizes, x.device).positions
    return x.new_empty(rows + 1, len(weight))


def _parse_norm(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, *rest: Any) -> tuple[Tensor, Layer, RowNorm]:
    groups, eps, relu, *plans = rest
    x, layer = _parse(x, weight, None, *plans)
    return x, layer, RowNorm(Norm(scale, shift, groups, eps, "position"), layer.target, relu)


_PLANS = "Tensor[] source, Tensor[] target, SymInt[] sizes, float? density, bool tf32, str impl"
_conv = operator("conv", f"Tensor x, Tensor weight, Tensor? bias, {_PLANS}", "Tensor", _parse, _fake, inputs=3)
_conv_norm = operator(
    "conv_norm",
    f"Tensor x, Tensor weight, Tensor scale, Tensor shift, int groups, float eps, bool relu, {_PLANS}",
    "Tensor",
    _parse_norm,
    lambda x, weight, scale, shift, groups, eps, relu, *plans: _fake(x, weight, None, *plans),
)


@register_flop_formula([torch.ops.dyndet.conv, torch.ops.dyndet.conv_norm])
def _flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two per multiply-add, of every row that there is room for."""
    out_channels, channels, height, width = weight
    return 2 * (out_shape[0] - 1) * out_channels * channels * height * width
