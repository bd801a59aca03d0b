"""Convolution of the map to very few channels, differentiable: the logits of gates.

A convolution to one or two channels starves on small vectors. Here one matrix product takes all taps at every position,
and each position then adds up what its neighbours hold for it:

    logits[o, p] = sum over taps t of  products[neighbour t of p, o, t],    products = x W

The gradient goes the same way back: what a position gets for a tap lies at its neighbour on the other side.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dyndet.ops.sparse.direct import autocast_dtype, direct
from dyndet.ops.sparse.layout import RowLayout


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
    return _logit_rows(x.to(dtype), weight.to(dtype), layout.neighbours)


def _forward(x: Tensor, weight: Tensor, neighbours: Tensor) -> Tensor:
    outputs, taps = len(weight), weight.shape[2] * weight.shape[3]
    products = F.linear(x[:-1], _matrix(weight)).to(_wide(x))
    if taps == 1:
        return products.t().contiguous()
    products = F.pad(products, (0, 0, 0, 1))  # what lies outside adds nothing
    own = torch.arange(outputs * taps, dtype=torch.int32, device=x.device).view(outputs, 1, taps)
    index = (neighbours * (outputs * taps) + own).view(-1)
    return products.view(-1).index_select(0, index).view(outputs, -1, taps).sum(2)


_registered = torch.library.custom_op("dyndet::logit_rows", _forward, mutates_args=())


@_registered.register_fake
def _(x: Tensor, weight: Tensor, neighbours: Tensor) -> Tensor:
    return x.new_empty(len(weight), len(x) - 1, dtype=_wide(x))


def _gradient(grad: Tensor, x: Tensor, weight: Tensor, neighbours: Tensor) -> tuple[Tensor, Tensor]:
    """-> gradients of x and weight."""
    outputs, channels, *kernel = weight.shape
    taps = kernel[0] * kernel[1]
    if taps == 1:
        of_products = grad.t().contiguous()
    else:
        opposite = neighbours.flip(1).view(-1)
        of_products = F.pad(grad, (0, 1)).t().contiguous().index_select(0, opposite).view(-1, taps, outputs)
        of_products = of_products.transpose(1, 2).reshape(-1, outputs * taps)
    of_products = of_products.to(x.dtype)
    grad_x = torch.empty_like(x)
    grad_x[-1] = 0
    matrix = _matrix(weight)
    torch.mm(of_products, matrix, out=grad_x[:-1])
    grad_weight = (of_products.t() @ x[:-1]).view(outputs, *kernel, channels).permute(0, 3, 1, 2)
    return grad_x, grad_weight.contiguous()


_registered_gradient = torch.library.custom_op("dyndet::logit_rows_backward", _gradient, mutates_args=())


@_registered_gradient.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, neighbours: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gradient = _gradient if getattr(ctx, "direct", False) else _registered_gradient
    return *gradient(grad, *ctx.saved_tensors), None


_registered.register_autograd(_backward, setup_context=_setup)
_logit_rows = direct(_registered, _forward, _setup, _backward)


def _matrix(weight: Tensor) -> Tensor:
    """(O, C, k, k) -> (O k k, C)."""
    return weight.permute(0, 2, 3, 1).reshape(-1, weight.shape[1])


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@register_flop_formula(torch.ops.dyndet.logit_rows)
def _flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two per multiply-add."""
    outputs, channels, height, width = weight
    return 2 * (x[0] - 1) * outputs * channels * height * width
