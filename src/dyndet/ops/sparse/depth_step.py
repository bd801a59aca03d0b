"""The depth step of a node: the residual branch of a basic block where its gate is open, differentiable.

y = ReLU(x + gate * norm2(conv2(ReLU(norm1(conv1(x))))))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dyndet.ops.sparse.conv import conv_rows, how_to_convolve
from dyndet.ops.sparse.conv_norm import conv_norm_rows
from dyndet.ops.sparse.direct import autocast_dtype, in_one_piece
from dyndet.ops.sparse.execute import dense, gather, whole
from dyndet.ops.sparse.execute.norm import Stats, norm, norm_backward
from dyndet.ops.sparse.execute.place import place, place_backward
from dyndet.ops.sparse.impl import Impl
from dyndet.ops.sparse.parameters import ConvNorm
from dyndet.ops.sparse.place import place_rows
from dyndet.ops.sparse.plan import Plan, whole_plan
from dyndet.ops.sparse.tables import neighbours


def depth_rows(
    x: Tensor, first: ConvNorm, second: ConvNorm, gate: Tensor, inner: Plan, outer: Plan, *,
    stats: Stats = "active", impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """A gated basic block on the rows of a pyramid.

    Args:
        x: (P + 1, C) rows of the pyramid.
        first: convolution 1, without bias, and its norm.
        second: convolution 2, without bias, and its norm.
        gate: (P,) what the branch is multiplied by.
        inner: where convolution 1 runs, the 3x3 neighbourhood of `outer`.
        outer: where convolution 2 runs.
        stats: see `norm_rows`.
        impl: execution.

    Returns:
        (P + 1, C), the last row zero.
    """
    x = x.to(autocast_dtype(x))
    if in_one_piece(x, impl) and inner.exact and outer.exact:
        tensors = [value for part in (first, second) for value in (part.to(x.dtype).weight, part.scale, part.shift)]
        how = [how_to_convolve(impl, plan, x, first.weight) for plan in (inner, outer)]
        if outer.whole and how == ["dense", "dense"]:
            return _WholeDepthStep.apply(x, gate, *tensors, (first, second), outer.layout, stats)
        return _DepthStep.apply(x, gate, *tensors, (first, second), (inner, outer), how, stats)
    hidden = conv_norm_rows(
        x, first.weight, first.groups, first.scale, first.shift, source=whole_plan(inner.layout), target=inner,
        stats=stats, eps=first.eps, relu=True, impl=impl,
    )  # fmt: skip
    hidden = conv_rows(hidden, second.weight, source=inner, target=outer, impl=impl)
    return place_rows(
        hidden, second.groups, second.scale, second.shift, gate, residual=x, plan=outer, stats=stats, eps=second.eps,
        relu=True, impl=impl,
    )  # fmt: skip


class _DepthStep(torch.autograd.Function):
    """The block in one piece, so that the gradients of `x` meet in one tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, *rest: Any) -> Tensor:
        w1, scale1, shift1, w2, scale2, shift2, (first, second), (inner, outer), (how1, how2), stats = rest
        index1 = _index(whole_plan(inner.layout), inner, how1)
        index2 = _index(inner, outer, how2)
        conv1 = _conv(x, w1, index1, whole_plan(inner.layout), inner)
        hidden, mean1, rstd1 = norm(
            conv1, scale1, shift1, inner.offsets, groups=first.groups, eps=first.eps, stats=stats, relu=True
        )
        conv2 = _conv(hidden, w2, index2, inner, outer)
        positions = outer.positions.long()
        y, normal, mean2, rstd2 = place(
            conv2, scale2, shift2, gate, x, positions, outer.offsets, groups=second.groups, eps=second.eps,
            stats=stats, relu=True,
        )  # fmt: skip
        ctx.save_for_backward(
            x, gate, w1, scale1, w2, scale2, conv1, hidden, mean1, rstd1, conv2, normal, mean2, rstd2, y,
            index1, index2, positions,
        )  # fmt: skip
        ctx.rest = first.groups, second.groups, inner, outer, stats
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, gate, w1, scale1, w2, scale2, conv1, hidden, mean1, rstd1, conv2, normal, mean2, rstd2, y, *indices = (
            ctx.saved_tensors
        )
        index1, index2, positions = indices
        groups1, groups2, inner, outer, stats = ctx.rest
        grad, grad_conv2, *of_norm2, of_gate = place_backward(
            grads[0], y, conv2, normal, scale2, mean2, rstd2, gate, positions, outer.offsets, groups=groups2,
            stats=stats, residual=True,
        )  # fmt: skip
        of_hidden, of_w2 = _conv_backward(grad_conv2, hidden, w2, index2, inner, outer, None)
        of_conv1, *of_norm1 = norm_backward(
            of_hidden, conv1, hidden, scale1, mean1, rstd1, inner.offsets, groups=groups1, stats=stats
        )
        _, of_w1 = _conv_backward(of_conv1, x, w1, index1, whole_plan(inner.layout), inner, grad)
        return grad, of_gate, of_w1, *of_norm1, of_w2, *of_norm2, *[None] * 4


class _WholeDepthStep(torch.autograd.Function):
    """The block in one piece where every position is computed; see `execute.whole`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, *rest: Any) -> Tensor:
        *tensors, (first, second), layout, stats = rest
        parts = _parts(tensors, first, second)
        y, states = whole.depth(x, *parts, gate, layout, stats)
        ctx.save_for_backward(x, y, gate, *tensors, *states)
        ctx.rest = first, second, layout, stats
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, y, gate, *saved = ctx.saved_tensors
        first, second, layout, stats = ctx.rest
        parts = _parts(saved[:6], first, second)
        of_x, of_gate, of_parts = whole.depth_backward(grads[0], x, y, *parts, gate, layout, saved[6:], stats)
        return of_x, of_gate, *of_parts, None, None, None


def _parts(tensors: Sequence[Tensor], first: ConvNorm, second: ConvNorm) -> tuple[ConvNorm, ConvNorm]:
    """Both parts with these weights, scales and shifts."""
    w1, scale1, shift1, w2, scale2, shift2 = tensors
    return (
        first._replace(weight=w1, scale=scale1, shift=shift1),
        second._replace(weight=w2, scale=scale2, shift=shift2),
    )


def _index(source: Plan, target: Plan, how: Impl) -> Tensor | None:
    """What to gather; None where the convolution is rather taken of the whole map."""
    if how != "gather":
        return None
    inverse = None if source.whole else source.inverse
    return gather.taps(target.positions, inverse, neighbours(target.layout), target.capacity)


def _conv(x: Tensor, weight: Tensor, index: Tensor | None, source: Plan, target: Plan) -> Tensor:
    if index is None:
        return dense.conv(x, weight, None, target.layout, *_places(source, target))
    return gather.conv(x, weight, None, index, target.capacity)


def _conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, index: Tensor | None, source: Plan, target: Plan, into: Tensor | None
) -> tuple[Tensor, Tensor]:
    if index is None:
        found = dense.conv_backward(grad, x, weight, target.layout, *_places(source, target), (True, True), into)
    else:
        found = gather.conv_backward(grad, x, weight, index, (True, True), into)
    return found  # type: ignore[return-value]  # both were asked for


def _places(source: Plan, target: Plan) -> tuple[Tensor | None, Tensor | None]:
    return None if source.whole else source.positions, None if target.whole else target.positions
