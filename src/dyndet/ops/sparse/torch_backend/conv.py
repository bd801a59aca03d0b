"""3x3 convolution of rows in plain torch: dense maps level by level, or gathered rows chunk by chunk.

Dense: the reference, and the faster way at high density. Rows are put on the map and taken from it again; levels
without rows are left out, where the host knows which these are.

Gathered: nine neighbours per row, then one matrix product per chunk. Rows are cut into chunks, and the gathered patches
of a chunk fit a workspace that stays in cache and is used again. With nine rows per output, one workspace for all of
them falls off a cliff: fresh pages cost more than the products. Every product reads the whole weight, and its gradient
is added to the whole of it: the larger the weight, the larger the chunks. Backward, patches are gathered again; one
product gives the weight's gradient, one the patches', which are added up where they came from. So every pass costs the
multiply-adds of the active rows, none more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dyndet.ops.sparse.conv import Layer
from dyndet.ops.sparse.operator import Gradients
from dyndet.ops.sparse.plan import Plan
from dyndet.ops.sparse.tables import neighbours

_LEAST_BYTES, _MOST_BYTES = 2 << 20, 8 << 20
_WEIGHTS = 7  # a workspace has room for as many times the weight


def conv(x: Tensor, layer: Layer) -> Tensor:
    """Rows of a 3x3 convolution, "dense" or by "gather", depthwise ones always densely; the last row is zero."""
    return (_gather if layer.impl == "gather" else _dense)(x, layer)


def conv_backward(grad: Tensor, needs: Sequence[bool], _: object, x: Tensor, layer: Layer) -> Gradients:
    """Gradients of x, weight and bias."""
    return (_gather_backward if layer.impl == "gather" else _dense_backward)(grad, needs, x, layer)


def _dense(x: Tensor, layer: Layer) -> Tensor:
    weight, bias, source, target, *_ = layer
    layout, groups, rows = target.layout, x.shape[1] // weight.shape[1], []
    bounds = target.bounds()
    for level, (start, stop), (first, last) in zip(
        layout.maps(_expand(x, source)), layout.levels, bounds or layout.levels, strict=True
    ):
        if last > first:
            computed = F.conv2d(level, weight, bias, padding=1, groups=groups).permute(0, 2, 3, 1).flatten(0, 2)
            partial = last - first < stop - start
            rows.append(computed[target.positions[first:last].long() - start] if partial else computed)
    found = torch.cat([*rows, x.new_zeros(1, len(weight))])
    return found if bounds else _select(found, target)


def _dense_backward(grad: Tensor, needs: Sequence[bool], x: Tensor, layer: Layer) -> Gradients:
    weight, _, source, target, *_ = layer
    layout, groups = target.layout, x.shape[1] // weight.shape[1]
    grads, levels = layout.maps(_expand(grad, target)), layout.maps(_expand(x, source))
    of_x, of_weight, of_bias = [], torch.zeros_like(weight), weight.new_zeros(len(weight))
    for part, level, (first, last) in zip(grads, levels, target.bounds() or layout.levels, strict=True):
        if first == last:
            of_x.append(torch.zeros_like(level))
            continue
        of_level, *of_parameters = torch.ops.aten.convolution_backward(
            part, level, weight, [len(weight)], [1, 1], [1, 1], [1, 1], False, [0, 0], groups, needs
        )
        of_x.append(of_level)
        of_weight = of_weight + of_parameters[0] if needs[1] else of_weight
        of_bias = of_bias + of_parameters[1] if needs[2] else of_bias
    return _select(layout.rows(of_x), source) if needs[0] else None, of_weight, of_bias


def _expand(rows: Tensor, plan: Plan) -> Tensor:
    """Rows put where they belong on the map, (P + 1, C), zero elsewhere."""
    if plan.whole:
        return rows
    out = rows.new_zeros(plan.layout.positions + 1, rows.shape[1])
    return out.index_copy_(0, _places(plan), rows[:-1])


def _select(rows: Tensor, plan: Plan) -> Tensor:
    """Rows of the map at the positions of a plan, and the last one."""
    return rows if plan.whole else rows.index_select(0, F.pad(_places(plan), (0, 1), value=plan.layout.positions))


def _places(plan: Plan) -> Tensor:
    """Int64 positions; P for spare rows."""
    if plan.exact:
        return plan.positions.long()
    index = torch.arange(plan.capacity, dtype=torch.int32, device=plan.positions.device)
    return torch.where(index < plan.count, plan.positions, plan.layout.positions).long()


def _gather(x: Tensor, layer: Layer) -> Tensor:
    out = x.new_empty(layer.target.capacity + 1, len(layer.weight))
    out[-1] = 0
    kernel = _matrix(layer.weight).t()
    for start, stop, _, patches in _patches(x, layer, x.dtype):
        if layer.bias is None:
            torch.mm(patches, kernel, out=out[start:stop])
        else:
            torch.addmm(layer.bias, patches, kernel, out=out[start:stop])
    return out


def _gather_backward(grad: Tensor, needs: Sequence[bool], x: Tensor, layer: Layer) -> Gradients:
    """Sums are taken in float32 where the features are of half precision."""
    out_channels, channels = layer.weight.shape[:2]
    sums = torch.promote_types(x.dtype, torch.float32)
    grad_x = torch.zeros_like(x, dtype=sums) if needs[0] else None
    grad_kernel = x.new_zeros(out_channels, 9 * channels, dtype=sums) if needs[1] else None
    kernel = _matrix(layer.weight)
    products: Tensor | None = None
    for start, stop, index, patches in _patches(x, layer, sums):
        part = grad[start:stop]
        if grad_kernel is not None and sums == x.dtype:
            grad_kernel.addmm_(part.t(), patches)
        elif grad_kernel is not None:
            grad_kernel += part.t() @ patches
        if grad_x is not None:
            products = torch.empty_like(patches) if products is None else products  # the first chunk is the largest
            rows = torch.mm(part, kernel, out=products[: stop - start]).view(-1, channels).to(sums)
            grad_x.scatter_add_(0, index.view(-1, 1).expand_as(rows), rows)  # in parallel
    if grad_x is not None:
        grad_x[-1] = 0  # collected what fell outside
    if grad_kernel is not None:
        grad_kernel = grad_kernel.view(out_channels, 3, 3, channels).permute(0, 3, 1, 2)
    return grad_x, grad_kernel, grad[: layer.target.rows].sum(0) if needs[2] else None


def _matrix(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) -> (O, 9 C), taps before channels; a view when the weight is channels-last."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def _patches(x: Tensor, layer: Layer, sums: torch.dtype) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Chunk by chunk: first and last + 1 row, the source rows that they read (int64, 9 n) and these as patches
    (n, 9 C), no more than fit when cast to `sums`.
    """
    weight, _, source, target, *_ = layer
    count = target.rows
    index = neighbours(target.layout).index_select(0, target.positions[:count]).view(-1)
    if not source.whole:
        index = source.inverse.index_select(0, index)
    index = index.long()  # torch moves rows twice as fast by these
    channels = x.shape[1]
    workspace_bytes = min(max(_LEAST_BYTES, _WEIGHTS * weight.numel() * sums.itemsize), _MOST_BYTES)
    most = max(64, workspace_bytes // (9 * channels * sums.itemsize))
    workspace = x.new_empty(9 * min(most, count), channels)
    for start in range(0, count, most):
        stop = min(start + most, count)
        patches = workspace[: 9 * (stop - start)]
        rows = index[9 * start : 9 * stop]
        torch.index_select(x, 0, rows, out=patches)
        yield start, stop, rows, patches.view(-1, 9 * channels)
