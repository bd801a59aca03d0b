"""Convolution of map rows to very few channels in plain torch.

A convolution to one or two channels starves on small vectors. Here a matrix product takes all taps at every position,
and each position then adds up what its neighbours hold for it:

    logits[o, p] = sum over taps t of  products[o, t, neighbour t of p],    products = W x

The products lie tap by tap, so that both the gather and the sum run along positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dyndet.layout import RowLayout
from dyndet.ops.sparse.tables import neighbours_by_tap


def gate_logits(x: Tensor, weight: Tensor, layout: RowLayout) -> Tensor:
    """(P + 1, C) rows, the last one zero, and (O, C, k, k) -> (O, P), at least float32."""
    outputs, taps = len(weight), weight.shape[2] * weight.shape[3]
    products = (_matrix(weight) @ x.t()).to(torch.promote_types(x.dtype, torch.float32))
    if taps == 1:
        return products[:, :-1].contiguous()
    index = neighbours_by_tap(layout)[0]
    return products.view(outputs, -1).index_select(1, index).view(outputs, taps, -1).sum(1)


def gate_logits_backward(grad: Tensor, x: Tensor, weight: Tensor, layout: RowLayout) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    outputs, channels, *kernel = weight.shape
    of_products = grad
    if kernel != [1, 1]:  # what a position gets for a tap lies at its neighbour on the other side
        index = neighbours_by_tap(layout)[1]
        of_products = F.pad(grad, (0, 1)).index_select(1, index).view(-1, layout.positions)
    of_products = of_products.to(x.dtype)
    grad_x = torch.empty_like(x)
    grad_x[-1] = 0
    torch.mm(of_products.t(), _matrix(weight), out=grad_x[:-1])
    of_weight = (of_products @ x[:-1]).view(outputs, *kernel, channels).permute(0, 3, 1, 2)
    return grad_x, of_weight.to(weight.dtype).contiguous()


def _matrix(weight: Tensor) -> Tensor:
    """(O, C, k, k) -> (O k k, C)."""
    return weight.permute(0, 2, 3, 1).reshape(-1, weight.shape[1])
