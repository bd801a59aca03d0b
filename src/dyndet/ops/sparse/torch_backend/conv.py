"""3x3 convolution of rows in plain torch: dense maps level by level, or gathered rows chunk by chunk.

Dense: the reference, and the faster way at high density. Levels without rows are left out; where only the device knows
which these are, none is.

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

from dyndet.ops.sparse.plan import Plan, whole_plan
from dyndet.ops.sparse.tables import neighbours
from dyndet.ops.sparse.torch_backend.levels import parts

_LEAST_BYTES, _MOST_BYTES = 2 << 20, 8 << 20
_WEIGHTS = 7  # a workspace has room for as many times the weight


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, source: Plan, target: Plan, impl: str, tf32: bool) -> Tensor:
    """Rows of a 3x3 convolution, depthwise where the weight has one input channel.

    Args:
        x: (source capacity + 1, C), the last row zero.
        weight: (O, C, 3, 3), or (C, 1, 3, 3) with "dense".
        bias: (O,) or None.
        source: of `x`.
        target: of the result.
        impl: "dense" or "gather".
        tf32: means nothing here, torch knows its own precision.

    Returns:
        (target capacity + 1, O), the last row zero.
    """
    return (_gather if impl == "gather" else _dense)(x, weight, bias, source, target)


def conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, source: Plan, target: Plan, needs: Sequence[bool], impl: str, tf32: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of `conv` for x, weight and bias, each where `needs` asks for it; None otherwise."""
    run = _gather_backward if impl == "gather" else _dense_backward
    grad_x, grad_weight = run(grad, x, weight, source, target, needs[0], needs[1])
    return grad_x, grad_weight, _counted(grad, target).sum(0) if needs[2] else None


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None, source: Plan, target: Plan) -> Tensor:
    if not (_readable(source) and _readable(target)):
        everything = whole_plan(target.layout)
        return _select(_dense(_expand(x, source), weight, bias, everything, everything), target)
    out = x.new_empty(target.capacity + 1, len(weight))
    out[-1] = 0
    for given, wanted in zip(parts(source), parts(target), strict=True):
        if not wanted.empty:
            groups = x.shape[1] // weight.shape[1]
            wanted.collect(F.conv2d(given.spread(x), weight, bias, padding=1, groups=groups), out)
    return out


def _dense_backward(
    grad: Tensor, x: Tensor, weight: Tensor, source: Plan, target: Plan, needs_x: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    if not (_readable(source) and _readable(target)):
        every = whole_plan(target.layout)
        grad, x = _expand(grad, target), _expand(x, source)
        of_x, of_weight = _dense_backward(grad, x, weight, every, every, needs_x, needs_weight)
        return None if of_x is None else _select(of_x, source), of_weight
    groups = x.shape[1] // weight.shape[1]
    grad_x = torch.empty_like(x) if needs_x else None
    grad_weight: Tensor | None = None
    for given, wanted in zip(parts(source), parts(target), strict=True):
        if wanted.empty:
            if grad_x is not None:
                grad_x[given.rows] = 0
            continue
        of_map, of_weight, _ = torch.ops.aten.convolution_backward(
            wanted.spread(grad), given.spread(x), weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], groups,
            [needs_x, needs_weight, False],
        )  # fmt: skip
        if grad_x is not None:
            given.collect(of_map, grad_x)
        if needs_weight:
            grad_weight = of_weight if grad_weight is None else grad_weight.add_(of_weight)
    if grad_x is not None:
        grad_x[-1] = 0
    if needs_weight and grad_weight is None:
        grad_weight = torch.zeros_like(weight)
    return grad_x, grad_weight


def _readable(plan: Plan) -> bool:
    """Whether its rows may be counted level by level: a GPU that counts them itself must not be waited for."""
    return plan.exact or not plan.positions.is_cuda


def _expand(rows: Tensor, plan: Plan) -> Tensor:
    """Rows put where they belong on the map, (P + 1, C), zero elsewhere."""
    if plan.whole:
        return rows
    out = rows.new_zeros(plan.layout.positions + 1, rows.shape[1])
    out.index_copy_(0, _places(plan), rows[:-1])
    out[-1] = 0  # where spare rows went
    return out


def _select(rows: Tensor, plan: Plan) -> Tensor:
    """Rows of the map at the positions of a plan, and the last one."""
    return rows if plan.whole else rows.index_select(0, F.pad(_places(plan), (0, 1), value=plan.layout.positions))


def _places(plan: Plan) -> Tensor:
    """Int64 positions; P for spare rows."""
    index = torch.arange(plan.capacity, dtype=torch.int32, device=plan.positions.device)
    return torch.where(index < plan.count, plan.positions, plan.layout.positions).long()


def _counted(rows: Tensor, plan: Plan) -> Tensor:
    """(capacity + 1, C) -> what is defined of them, spare rows zero where the host must not wait for their number."""
    if _readable(plan):
        return rows[: plan.rows]
    return torch.where((_places(plan) < plan.layout.positions)[:, None], rows[:-1], 0)


def _gather(x: Tensor, weight: Tensor, bias: Tensor | None, source: Plan, target: Plan) -> Tensor:
    out = x.new_empty(target.capacity + 1, len(weight))
    out[-1] = 0
    kernel = _matrix(weight).t()
    for start, stop, _, patches in _patches(x, source, target, weight, x.dtype):
        if bias is None:
            torch.mm(patches, kernel, out=out[start:stop])
        else:
            torch.addmm(bias, patches, kernel, out=out[start:stop])
    return out


def _gather_backward(
    grad: Tensor, x: Tensor, weight: Tensor, source: Plan, target: Plan, needs_x: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Sums are taken in float32 where the features are of half precision."""
    out_channels, channels = weight.shape[:2]
    sums = torch.promote_types(x.dtype, torch.float32)
    grad_x = torch.zeros_like(x, dtype=sums) if needs_x else None
    grad_kernel = weight.new_zeros(out_channels, 9 * channels, dtype=sums) if needs_weight else None
    kernel = _matrix(weight)
    products: Tensor | None = None
    for start, stop, index, patches in _patches(x, source, target, weight, sums):
        part = grad[start:stop]
        if grad_kernel is not None:
            if sums == x.dtype:
                grad_kernel.addmm_(part.t(), patches)
            else:
                grad_kernel += part.t() @ patches
        if grad_x is not None:
            products = torch.empty_like(patches) if products is None else products  # the first chunk is the largest
            rows = torch.mm(part, kernel, out=products[: stop - start]).view(-1, channels).to(sums)
            grad_x.scatter_add_(0, index.view(-1, 1).expand_as(rows), rows)  # in parallel
    if grad_x is not None:
        grad_x[-1] = 0  # collected what fell outside
        grad_x = grad_x.to(x.dtype)
    if grad_kernel is not None:
        grad_kernel = grad_kernel.view(out_channels, 3, 3, channels).permute(0, 3, 1, 2).to(weight.dtype)
    return grad_x, grad_kernel


def _matrix(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) -> (O, 9 C), taps before channels; a view when the weight is channels-last."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def _patches(
    x: Tensor, source: Plan, target: Plan, weight: Tensor, sums: torch.dtype
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Chunk by chunk: first and last + 1 row, the source rows that they read (int64, 9 n) and these as patches
    (n, 9 C), no more than fit when cast to `sums`.
    """
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
