"""Convolution of the map to very few channels, differentiable: the logits of gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dyndet.layout import RowLayout
from dyndet.ops.sparse.direct import autocast_dtype, ordinary
from dyndet.ops.sparse.execute import logits as execute


def logit_rows(x: Tensor, weight: Tensor, layout: RowLayout) -> tuple[Tensor, Tensor]:
    """Same-size convolution of map rows to a few channels.

    Args:
        x: (P + 1, C) rows of the map, the last one zero.
        weight: (O, C, k, k), k = 1 or 3.
        layout: of the rows.

    Returns:
        (O, P), at least float32; and the rows again, in the type of autocast. Who goes on with these saves a pass over
        the map in the backward direction: their gradient and that of the logits meet inside one product.
    """
    dtype = autocast_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    if ordinary(x):
        logits, again = _Logits.apply(x, weight, layout)
        return logits, again if x.requires_grad else x
    return _registered(x, weight, layout.sizes), x


class _Logits(torch.autograd.Function):
    """Logits and the rows they were taken of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layout: RowLayout) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.layout = layout
        ctx.set_materialize_grads(False)
        return execute.logits(x, weight, layout), x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        of_logits, of_x = grads
        if of_logits is None:
            return of_x, None, None
        x, weight = ctx.saved_tensors
        return *execute.logits_backward(of_logits, x, weight, ctx.layout, of_x), None


def _forward(x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
    return execute.logits(x, weight, RowLayout.from_sizes(sizes, x.device))


_registered = torch.library.custom_op("dyndet::logit_rows", _forward, mutates_args=())


@_registered.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(len(weight), len(x) - 1, dtype=torch.promote_types(x.dtype, torch.float32))


def _gradient(grad: Tensor, x: Tensor, weight: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """-> gradients of x and weight."""
    return execute.logits_backward(grad, x, weight, RowLayout.from_sizes(sizes, x.device))


_registered_gradient = torch.library.custom_op("dyndet::logit_rows_backward", _gradient, mutates_args=())


@_registered_gradient.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *ctx.rest = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *_registered_gradient(grad, *ctx.saved_tensors, *ctx.rest), None


_registered.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.dyndet.logit_rows)
def _flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two per multiply-add."""
    outputs, channels, height, width = weight
    return 2 * (x[0] - 1) * outputs * channels * height * width
