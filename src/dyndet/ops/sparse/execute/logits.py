"""Convolution of map rows to very few channels in plain torch, in two ways.

A convolution to one or two channels starves on small vectors. Here a matrix product takes all taps at every position,
and each position then adds up what its neighbours hold for it:

    logits[o, p] = sum over taps t of  products[o, t, neighbour t of p],    products = W x

"By level" that sum is `fold` of a level's products with the taps turned round, its gradient `unfold`: the fast way on a
CPU. "By index" it is one gather for all levels: the few launches that a GPU wants.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dyndet.ops.sparse.layout import RowLayout


def by_level(x: Tensor, weight: Tensor, layout: RowLayout) -> Tensor:
    """(P + 1, C) rows and (O, C, k, k) -> (O, P), at least float32."""
    outputs, kernel = len(weight), weight.shape[-1]
    matrix = _matrix(weight.flip(2, 3))
    logits = x.new_empty(outputs, layout.positions, dtype=_wide(x))
    for (start, stop), shape in zip(layout.levels, layout.shapes, strict=True):
        products = matrix @ x[start:stop].view(layout.batch, -1, x.shape[1]).mT
        if kernel > 1:
            columns = products.to(logits.dtype).view(1, -1, shape[0] * shape[1])
            products = F.fold(columns, shape, kernel, padding=kernel // 2)
        products = products.view(layout.batch, outputs, -1).transpose(0, 1)
        logits[:, start:stop].view(outputs, layout.batch, -1).copy_(products)
    return logits


def by_level_backward(grad: Tensor, x: Tensor, weight: Tensor, layout: RowLayout) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    batch = layout.batch
    outputs, channels, kernel, _ = weight.shape
    matrix = _matrix(weight.flip(2, 3))
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
    return grad_x, _taps(of_matrix, weight).flip(2, 3).contiguous()


def by_index(x: Tensor, weight: Tensor, layout: RowLayout) -> Tensor:
    """As `by_level`."""
    outputs, taps = len(weight), weight.shape[2] * weight.shape[3]
    products = F.linear(x[:-1], _matrix(weight)).to(_wide(x))
    if taps == 1:
        return products.t().contiguous()
    products = F.pad(products, (0, 0, 0, 1))  # what lies outside adds nothing
    own = torch.arange(outputs * taps, dtype=torch.int32, device=x.device).view(outputs, 1, taps)
    index = (layout.neighbours * (outputs * taps) + own).view(-1)
    return products.view(-1).index_select(0, index).view(outputs, -1, taps).sum(2)


def by_index_backward(grad: Tensor, x: Tensor, weight: Tensor, layout: RowLayout) -> tuple[Tensor, Tensor]:
    """As `by_level_backward`: what a position gets for a tap lies at its neighbour on the other side."""
    outputs, taps = len(weight), weight.shape[2] * weight.shape[3]
    if taps == 1:
        of_products = grad.t().contiguous()
    else:
        opposite = layout.neighbours.flip(1).view(-1)
        of_products = F.pad(grad, (0, 1)).t().contiguous().index_select(0, opposite).view(-1, taps, outputs)
        of_products = of_products.transpose(1, 2).reshape(-1, outputs * taps)
    of_products = of_products.to(x.dtype)
    grad_x = torch.empty_like(x)
    grad_x[-1] = 0
    torch.mm(of_products, _matrix(weight), out=grad_x[:-1])
    return grad_x, _taps(of_products.t() @ x[:-1], weight).contiguous()


def _matrix(weight: Tensor) -> Tensor:
    """(O, C, k, k) -> (O k k, C)."""
    return weight.permute(0, 2, 3, 1).reshape(-1, weight.shape[1])


def _taps(matrix: Tensor, like: Tensor) -> Tensor:
    """(O k k, C) -> (O, C, k, k), in the type of `like`."""
    outputs, channels, *kernel = like.shape
    return matrix.view(outputs, *kernel, channels).permute(0, 3, 1, 2).to(like.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
