"""3x3 convolution from the rows of one plan to the rows of another, differentiable.

    target[n] = bias + sum over taps t of  W[:, :, t] @ source[ row of (position of n + offset of t) ]

The source is the whole map (first convolution of a block, which reads everything) or the rows of another plan.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dyndet.layout import RowLayout
from dyndet.ops.sparse.direct import allows_tf32, autocast_dtype, direct
from dyndet.ops.sparse.execute import dense, gather, triton
from dyndet.ops.sparse.impl import Impl, choose
from dyndet.ops.sparse.plan import Plan
from dyndet.ops.sparse.tables import neighbours, segment
from dyndet.routing import Work


def conv_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, source: Plan, target: Plan, impl: Impl = "auto"
) -> Tensor:
    """Same-size, stride-1 3x3 convolution of rows; depthwise where the weight has one input channel.

    Args:
        x: (source capacity + 1, C), the last row standing for zero.
        weight: (O, C, 3, 3), or (C, 1, 3, 3) for a depthwise convolution.
        bias: (O,) or None.
        source: the plan of `x`.
        target: the rows to compute.
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
    layout = target.layout
    how = how_to_convolve(impl, target, x, weight)
    for plan in (source, target):
        plan.check(how == "triton")
    return _conv_rows(
        x, weight, bias, *source.tensors, *target.tensors, neighbours(layout), layout.sizes, source.whole,
        target.whole, how, -1.0 if target.density is None else target.density, allows_tf32(dtype),
    )  # fmt: skip


def conv_work(x: Tensor, weight: Tensor, *, target: Plan, impl: Impl = "auto") -> Work:
    """What `conv_rows` with these arguments computes."""
    how = how_to_convolve(impl, target, x, weight)
    positions = target.layout.positions
    rows = target.capacity if target.exact else target.count
    tile = 1
    if how == "triton":
        tile = triton.kernels().tile_rows(x, weight, positions, target.density, tf32=allows_tf32(x.dtype))
    return Work(float(weight.numel()), rows, tile, positions if how == "dense" else None)


def how_to_convolve(impl: Impl, target: Plan, x: Tensor, weight: Tensor) -> Impl:
    """The execution that `conv_rows` takes: "dense", "gather" or "triton"."""
    how = choose(impl, target.density, x.shape[1], x.dtype, x.device)
    # Nine multiply-adds per value of a depthwise convolution do not pay for gathering nine values.
    return "dense" if how == "gather" and weight.shape[1] < x.shape[1] else how


def _defined(positions: Tensor, offsets: Tensor, nowhere: int) -> Tensor:
    """Positions whose undefined end, if there is one, points nowhere."""
    if len(positions) < nowhere:
        return positions
    index = torch.arange(len(positions), dtype=torch.int32, device=positions.device)
    return torch.where(index < offsets[-1], positions, nowhere)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, source_positions: Tensor, source_inverse: Tensor,
    source_offsets: Tensor, positions: Tensor, inverse: Tensor, offsets: Tensor, neighbours: Tensor,
    sizes: list[int], source_whole: bool, target_whole: bool, how: str, density: float, tf32: bool,
) -> Tensor:  # fmt: skip
    if how == "triton":
        arguments = x, weight, bias, positions, None if source_whole else source_inverse, neighbours, offsets
        if weight.shape[1] < x.shape[1]:
            return triton.kernels().depthwise(*arguments)
        return triton.kernels().conv(*arguments, tf32=tf32, density=None if density < 0 else density)
    if how == "gather":
        rows = None if source_whole else source_inverse
        index = gather.taps(positions, rows, neighbours, int(offsets[-1]))
        return gather.conv(x, weight, bias, index, len(positions))
    layout = RowLayout.from_sizes(sizes, x.device)
    source = None if source_whole else _defined(source_positions, source_offsets, layout.positions)
    target = None if target_whole else _defined(positions, offsets, layout.positions)
    return dense.conv(x, weight, bias, layout, source, target)


_registered = torch.library.custom_op("dyndet::conv_rows", _forward, mutates_args=())


@_registered.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, source_positions: Tensor, source_inverse: Tensor,
    source_offsets: Tensor, positions: Tensor, *_: Any,
) -> Tensor:  # fmt: skip
    return x.new_empty(len(positions) + 1, len(weight))


def _gradient(
    grad: Tensor, x: Tensor, weight: Tensor, source_positions: Tensor, source_inverse: Tensor,
    source_offsets: Tensor, positions: Tensor, inverse: Tensor, offsets: Tensor, neighbours: Tensor,
    sizes: list[int], source_whole: bool, target_whole: bool, how: str, density: float, tf32: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight and bias; empty where not needed."""
    layout = RowLayout.from_sizes(sizes, x.device)
    needs_x, needs_weight, needs_bias = needs
    grad_x: Tensor | None = None
    grad_weight: Tensor | None = None
    grad_bias: Tensor | None = None
    if how == "triton":
        kernels = triton.kernels()
        run, run_weight = kernels.depthwise, kernels.depthwise_weight_grad
        if weight.shape[1] == x.shape[1]:
            run, run_weight = partial(kernels.conv, tf32=tf32), partial(kernels.conv_weight_grad, tf32=tf32)
        grad = grad.contiguous()
        if needs_x and source_whole:  # only positions near an active one receive anything
            near = kernels.plan(inverse[:-1] < len(positions), None, neighbours, segment(layout), layout.segments, [1])
            grad_x = run(grad, weight, None, near[0][0], inverse, neighbours, near[0][2], transposed=True, place=True)
        elif needs_x:
            grad_x = run(grad, weight, None, source_positions, inverse, neighbours, source_offsets, transposed=True)
        if needs_weight or needs_bias:
            of_weight, of_bias = run_weight(
                x, grad, positions, None if source_whole else source_inverse, neighbours, offsets
            )
            grad_weight, grad_bias = of_weight, of_bias.clone()  # an operator must not return parts of one buffer
    else:
        if how == "gather":
            rows = None if source_whole else source_inverse
            index = gather.taps(positions, rows, neighbours, int(offsets[-1]))
            grad_x, grad_weight = gather.conv_backward(grad, x, weight, index, (needs_x, needs_weight))
        else:
            grad_x, grad_weight = dense.conv_backward(
                grad, x, weight, layout,
                None if source_whole else _defined(source_positions, source_offsets, layout.positions),
                None if target_whole else _defined(positions, offsets, layout.positions),
                (needs_x, needs_weight),
            )  # fmt: skip
        if needs_bias:
            grad_bias = _rows_defined(grad, positions, offsets, target_whole).sum(0)
    return (
        x.new_empty(0) if grad_x is None else grad_x,
        x.new_empty(0) if grad_weight is None else grad_weight.to(weight.dtype),
        x.new_empty(0) if grad_bias is None else grad_bias.to(weight.dtype),
    )


def _rows_defined(rows: Tensor, positions: Tensor, offsets: Tensor, whole: bool) -> Tensor:
    if rows.device.type == "cpu":
        return rows[: int(offsets[-1])]
    if whole:
        return rows[:-1]
    defined = torch.arange(len(positions), device=rows.device) < offsets[-1]
    return torch.where(defined[:, None], rows[:-1], 0)


_registered_gradient = torch.library.custom_op("dyndet::conv_rows_backward", _gradient, mutates_args=())


@_registered_gradient.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, source_positions: Tensor, source_inverse: Tensor,
    source_offsets: Tensor, positions: Tensor, inverse: Tensor, offsets: Tensor, neighbours: Tensor,
    sizes: list[int], source_whole: bool, target_whole: bool, how: str, density: float, tf32: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shapes = (tuple(x.shape), tuple(weight.shape), (len(weight),))
    x_like, weight_like, bias_like = (
        like.new_empty(shape if needed else 0)
        for like, shape, needed in zip((x, weight, weight), shapes, needs, strict=True)
    )
    return x_like, weight_like, bias_like


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *tables = inputs[:10]
    ctx.save_for_backward(x, weight, *tables)
    ctx.rest = inputs[10:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gradient = _gradient if getattr(ctx, "direct", False) else _registered_gradient
    needs = list(ctx.needs_input_grad[:3])
    saved: list[Any] = [*ctx.saved_tensors, *ctx.rest, needs]
    grads = gradient(grad, *saved)
    return *(value if needed else None for value, needed in zip(grads, needs, strict=True)), *[None] * 13


_registered.register_autograd(_backward, setup_context=_setup)
_conv_rows = direct(_registered, _forward, _setup, _backward)


@register_flop_formula(torch.ops.dyndet.conv_rows)
def _flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two per multiply-add, of every row that there is room for."""
    out_channels, channels, height, width = weight
    return 2 * (out_shape[0] - 1) * out_channels * channels * height * width
