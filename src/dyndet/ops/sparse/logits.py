"""Convolution of the map to very few channels, differentiable: the logits of gates.

A convolution to one or two channels starves on small vectors. Here a matrix product takes all taps at every position,
and each position then adds up what its neighbours hold for it:

    logits[o, p] = sum over taps t of  products[o, t, neighbour t of p],    products = W x

That is `fold` of a level's products, with the taps turned round; the gradient is `unfold`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dyndet.ops.sparse.direct import autocast_dtype, direct
from dyndet.ops.sparse.layout import RowLayout, from_sizes


def logit_rows(x: Tensor, weight: Tensor, layout: RowLayout) -> Tensor:
    """Same-size convolution of map rows to a few channels.

    Args:
        x: (P + 1, C) rows of the map.
        weight: (O, C, k, k), k = 1 or 3.
        layout: of the rows.

    Returns:
        (O, P), at least float32.
    """
    dtype = autocast_dtype(x)
    return _logit_rows(x.to(dtype), weight.to(dtype), layout.sizes, layout.batch)


def _forward(x: Tensor, weight: Tensor, sizes: list[int], batch: int) -> Tensor:
    layout = from_sizes(sizes, batch, x.device)
    outputs, kernel = len(weight), weight.shape[-1]
    matrix = _matrix(weight)
    logits = x.new_empty(outputs, layout.positions, dtype=_wide(x))
    for (start, stop), shape in zip(layout.levels, layout.shapes, strict=True):
        products = matrix @ x[start:stop].view(batch, -1, x.shape[1]).mT
        if kernel > 1:
            columns = products.to(logits.dtype).view(1, -1, shape[0] * shape[1])
            products = F.fold(columns, shape, kernel, padding=kernel // 2)
        logits[:, start:stop].view(outputs, batch, -1).copy_(products.view(batch, outputs, -1).transpose(0, 1))
    return logits


_registered = torch.library.custom_op("dyndet::logit_rows", _forward, mutates_args=())


@_registered.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(len(weight), len(x) - 1, dtype=_wide(x))


def _gradient(grad: Tensor, x: Tensor, weight: Tensor, sizes: list[int], batch: int) -> tuple[Tensor, Tensor]:
    """-> gradients of x and weight."""
    layout = from_sizes(sizes, batch, x.device)
    outputs, channels, kernel, _ = weight.shape
    matrix = _matrix(weight)
    grad_x = torch.empty_like(x)
    grad_x[-1] = 0
    of_matrix = torch.zeros_like(matrix, dtype=grad.dtype)
    for (start, stop), shape in zip(layout.levels, layout.shapes, strict=True):
        of_maps = grad[:, start:stop].view(outputs, batch, -1).transpose(0, 1)
        if kernel > 1:
            of_maps = F.unfold(of_maps.reshape(1, -1, *shape), kernel, padding=kernel // 2)
        of_products = of_maps.to(x.dtype).reshape(batch, len(matrix), -1)
        maps = x[start:stop].view(batch, -1, channels)
        torch.bmm(of_products.mT, matrix.expand(batch, -1, -1), out=grad_x[start:stop].view(maps.shape))
        of_matrix += torch.bmm(of_products, maps).sum(0)
    of_weight = of_matrix.view(outputs, kernel, kernel, channels).flip(1, 2).permute(0, 3, 1, 2)
    return grad_x, of_weight.to(weight.dtype).contiguous()


_registered_gradient = torch.library.custom_op("dyndet::logit_rows_backward", _gradient, mutates_args=())


@_registered_gradient.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *ctx.rest = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gradient = _gradient if getattr(ctx, "direct", False) else _registered_gradient
    return *gradient(grad, *ctx.saved_tensors, *ctx.rest), None, None


_registered.register_autograd(_backward, setup_context=_setup)
_logit_rows = direct(_registered, _forward, _setup, _backward)


def _matrix(weight: Tensor) -> Tensor:
    """(O, C, k, k) -> (O k k, C), taps turned round: what a neighbour gives goes the other way."""
    return weight.flip(2, 3).permute(0, 2, 3, 1).reshape(-1, weight.shape[1])


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@register_flop_formula(torch.ops.dyndet.logit_rows)
def _flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two per multiply-add."""
    outputs, channels, height, width = weight
    return 2 * (x[0] - 1) * outputs * channels * height * width
