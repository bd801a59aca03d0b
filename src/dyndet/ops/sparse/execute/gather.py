"""3x3 convolution of rows in plain torch: gather nine neighbours per row, then one matrix product per chunk.

Memory plan: rows are cut into chunks, and the gathered patches of a chunk fit a workspace that stays in cache and is
used again. With nine rows per output, one workspace for all of them falls off a cliff: fresh pages cost more than the
products. Every product reads the whole weight, and its gradient is added to the whole of it: the larger the weight, the
larger the chunks. Products are written where they belong.

Backward: patches are gathered again; one product gives the weight's gradient, one the patches', which are added up
where they came from. So every pass costs the multiply-adds of the active rows, none more.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_LEAST_BYTES, _MOST_BYTES = 2 << 20, 8 << 20
_WEIGHTS = 7  # a workspace has room for as many times the weight


def taps(positions: Tensor, inverse: Tensor | None, neighbours: Tensor, count: int) -> Tensor:
    """What the rows of a 3x3 convolution read.

    Args:
        positions: int32 (capacity,), the position of every target row.
        inverse: int32 (P + 1,), the source row of every position, R where there is none; None where rows are the map.
        neighbours: int32 (P, 9), see `RowLayout.neighbours`.
        count: number of target rows.

    Returns:
        int64 (count, 9) source rows (torch moves rows twice as fast by long indices).
    """
    index = neighbours.index_select(0, positions[:count])
    if inverse is not None:
        index = inverse.index_select(0, index.view(-1)).view(-1, 9)
    return index.long()


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, capacity: int) -> Tensor:
    """Rows of a 3x3 convolution.

    Args:
        x: (R + 1, C) source rows, the last one zero.
        weight: (O, C, 3, 3).
        bias: (O,) or None.
        index: int64 (count, 9), see `taps`.
        capacity: rows that there is room for.

    Returns:
        (capacity + 1, O), the last row zero.
    """
    out = x.new_empty(capacity + 1, len(weight))
    out[-1] = 0
    kernel = _matrix(weight).t()
    for start, stop, patches in _patches(x, index, weight, x.dtype):
        if bias is None:
            torch.mm(patches, kernel, out=out[start:stop])
        else:
            torch.addmm(bias, patches, kernel, out=out[start:stop])
    return out


def conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, index: Tensor, needs: tuple[bool, bool], into: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `conv` for its input and its weight, each where `needs` asks for it.

    Args:
        grad: (capacity + 1, O), of the output; the last row does not count.
        needs: input, weight.
        into: (R + 1, C), what the input's gradient is added to, in place; None begins with zeros.

    Returns:
        (R + 1, C) and (O, C, 3, 3). Sums are taken in float32 where the features are of half precision.
    """
    out_channels, channels = weight.shape[:2]
    sums = torch.promote_types(x.dtype, torch.float32)
    grad_x = None
    if needs[0]:
        grad_x = into if into is not None and into.dtype == sums else torch.zeros_like(x, dtype=sums)
    grad_kernel = weight.new_zeros(out_channels, 9 * channels, dtype=sums) if needs[1] else None
    kernel = _matrix(weight)
    products: Tensor | None = None
    wide: Tensor | None = None
    for start, stop, patches in _patches(x, index, weight, sums):
        part = grad[start:stop]
        if grad_kernel is not None:
            if sums == x.dtype:
                grad_kernel.addmm_(part.t(), patches)
            else:
                grad_kernel += part.t() @ patches
        if grad_x is not None:
            if products is None or wide is None:  # the first chunk is the largest
                products = torch.empty_like(patches)
                wide = products if sums == x.dtype else torch.empty_like(products, dtype=sums)
            torch.mm(part, kernel, out=products[: stop - start])
            if wide is not products:
                wide[: stop - start] = products[: stop - start]
            rows = wide[: stop - start].view(-1, channels)
            grad_x.scatter_add_(0, index[start:stop].view(-1, 1).expand_as(rows), rows)  # in parallel
    if grad_x is not None:
        grad_x[-1] = 0  # collected what fell outside
        grad_x = grad_x.to(x.dtype) if into is None or grad_x is into else into.add_(grad_x)
    if grad_kernel is not None:
        grad_kernel = grad_kernel.view(out_channels, 3, 3, channels).permute(0, 3, 1, 2).to(weight.dtype)
    return grad_x, grad_kernel


def _matrix(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) -> (O, 9 C), taps before channels; a view when the weight is channels-last."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def _patches(x: Tensor, index: Tensor, weight: Tensor, sums: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """Chunk by chunk: first and last + 1 row, and their patches (n, 9 C), no more than fit when cast to `sums`."""
    channels, count = x.shape[1], len(index)
    workspace_bytes = min(max(_LEAST_BYTES, _WEIGHTS * weight.numel() * sums.itemsize), _MOST_BYTES)
    most = max(64, workspace_bytes // (9 * channels * sums.itemsize))
    workspace = x.new_empty(9 * min(most, count), channels)
    for start in range(0, count, most):
        stop = min(start + most, count)
        patches = workspace[: 9 * (stop - start)]
        torch.index_select(x, 0, index[start:stop].view(-1), out=patches)
        yield start, stop, patches.view(-1, 9 * channels)
