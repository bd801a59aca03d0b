"""Convolution and the norm behind it, in one launch where that is possible.

Statistics per position need nothing but the row they normalise, so the convolution's own tile can take them. Where a
backward pass will follow, where statistics span positions, and on the CPU these are two operations after all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyndet.ops.sparse.conv import conv_rows, how_to_convolve
from dyndet.ops.sparse.direct import allows_tf32, autocast_dtype
from dyndet.ops.sparse.execute import triton
from dyndet.ops.sparse.execute.norm import Stats
from dyndet.ops.sparse.impl import Impl
from dyndet.ops.sparse.norm import norm_rows
from dyndet.ops.sparse.plan import Plan
from dyndet.ops.sparse.tables import neighbours


def conv_norm_rows(
    x: Tensor, weight: Tensor, num_groups: int, scale: Tensor, shift: Tensor, *, source: Plan, target: Plan,
    stats: Stats = "active", eps: float = 1e-5, relu: bool = False, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """`norm_rows(conv_rows(x))`.

    Args:
        x: (source capacity + 1, C).
        weight: (O, C, 3, 3), no bias.
        num_groups: divides O.
        scale: (O,) of the norm.
        shift: (O,) of the norm.
        source: the plan of `x`.
        target: the rows to compute.
        stats: see `norm_rows`.
        eps: see `norm_rows`.
        relu: see `norm_rows`.
        impl: execution.

    Returns:
        (target capacity + 1, O).
    """
    if stats == "position" and not torch.is_grad_enabled() and how_to_convolve(impl, target, x, weight) == "triton":
        source.check(kernels=True)
        target.check(kernels=True)
        dtype = autocast_dtype(x)
        inverse = None if source.whole else source.inverse
        return _conv_norm_rows(
            x.to(dtype), weight.to(dtype), scale, shift, target.positions, inverse, neighbours(target.layout),
            target.offsets, num_groups, eps, relu, target.density, allows_tf32(dtype),
        )  # fmt: skip
    x = conv_rows(x, weight, source=source, target=target, impl=impl)
    return norm_rows(x, num_groups, scale, shift, plan=target, stats=stats, eps=eps, relu=relu, impl=impl)


@torch.library.custom_op("dyndet::conv_norm_rows", mutates_args=())
def _conv_norm_rows(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, positions: Tensor, inverse: Tensor | None,
    neighbours: Tensor, offsets: Tensor, groups: int, eps: float, relu: bool, density: float | None, tf32: bool,
) -> Tensor:  # fmt: skip
    kernels = triton.kernels()
    norm = kernels.PositionNorm(scale, shift, groups, eps, relu)
    gather = positions, inverse, neighbours, offsets
    return kernels.conv(x, weight, None, *gather, norm=norm, tf32=tf32, density=density)


@_conv_norm_rows.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, positions: Tensor, *_: Any) -> Tensor:
    return x.new_empty(len(positions) + 1, len(weight))
