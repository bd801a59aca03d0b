"""The scale step of a node: every level adds what its neighbours send, gates included, differentiable.

s = own * x + weight * (resampled g_down * norm(down * x) of the finer level + g_up * norm(up * x) of the coarser)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dyndet.ops.sparse.conv import conv_rows, conv_work
from dyndet.ops.sparse.conv_norm import ConvNorm
from dyndet.ops.sparse.direct import autocast_dtype, in_one_piece
from dyndet.ops.sparse.exchange import exchange_rows
from dyndet.ops.sparse.execute.norm import Stats
from dyndet.ops.sparse.execute.send import Route, send, send_backward
from dyndet.ops.sparse.impl import Impl
from dyndet.ops.sparse.place import place_rows
from dyndet.ops.sparse.plan import Plan, whole_plan
from dyndet.structures import Work


def scale_rows(
    x: Tensor, own: Tensor, weight: Tensor, down: ConvNorm, up: ConvNorm, gates: tuple[Tensor, Tensor],
    plans: tuple[Plan, Plan], *, stats: Stats = "active", impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Adds to every level what its neighbours send, resampled as `exchange_rows` does.

    Args:
        x: (P + 1, C) rows of the pyramid.
        own: (1,) weight of `x`.
        weight: (1,) weight of what arrives.
        down: depthwise convolution and norm of what goes to coarser levels.
        up: the same of what goes to finer levels.
        gates: (P,) of down and up.
        plans: where down and up are computed. The last level sends nothing down, the first nothing up.
        stats: see `norm_rows`.
        impl: execution.

    Returns:
        (P + 1, C), the last row zero.
    """
    if in_one_piece(x, impl):
        x = x.to(autocast_dtype(x))
        tensors = [
            value
            for part, gate in zip((down, up), gates, strict=True)
            for value in (part.weight.to(x.dtype), _cast(part.bias, x), part.scale, part.shift, gate)
        ]
        return _ScaleStep.apply(x, own, weight, *tensors, plans, (down, up), stats)
    layout = plans[0].layout
    down_rows, up_rows = (
        place_rows(
            conv_rows(x, part.weight, part.bias, source=whole_plan(layout), target=plan, impl=impl),
            part.groups, part.scale, part.shift, gate, plan=plan, stats=stats, eps=part.eps, impl=impl,
        )
        for part, gate, plan in zip((down, up), gates, plans, strict=True)
    )  # fmt: skip
    return exchange_rows(x, down_rows, up_rows, own, weight, layout)


def scale_work(x: Tensor, down: ConvNorm, up: ConvNorm, plans: tuple[Plan, Plan], *, impl: Impl = "auto") -> list[Work]:
    """What `scale_rows` with these arguments computes."""
    work = [conv_work(x, part.weight, target=plan, impl=impl) for part, plan in zip((down, up), plans, strict=True)]
    if not in_one_piece(x, impl):
        return work
    routes = (_route(plan, step) for plan, step in zip(plans, _STEPS, strict=True))
    return [replace(item, dense=route.computed) for item, route in zip(work, routes, strict=True)]


_STEPS = (1, -1)


def _route(plan: Plan, step: int) -> Route:
    return Route(plan.layout, plan.positions, plan.offsets.tolist(), step)


def _cast(bias: Tensor | None, like: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(like.dtype)


class _ScaleStep(torch.autograd.Function):
    """Both directions in one piece; see `execute.send`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, own: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        *tensors, plans, parts, ctx.stats = rest
        saved = [x, own, weight]
        ctx.routes = []
        s = x * own.to(x.dtype)
        for first, step, plan, part in zip((0, 5), _STEPS, plans, parts, strict=True):
            conv, bias, scale, shift, gate = tensors[first : first + 5]
            route = _route(plan, step)
            gate = gate if plan.whole else gate.index_select(0, plan.positions)
            states = send(
                x, conv, bias, scale, shift, gate, route, groups=part.groups, eps=part.eps, stats=ctx.stats,
                offsets=plan.offsets, into=s, factor=float(weight),
            )  # fmt: skip
            saved += [conv, scale, gate, plan.offsets, *states]
            ctx.routes.append((route, part.groups, bias is not None))
        ctx.save_for_backward(*saved)
        return s

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, own, weight, *saved = ctx.saved_tensors
        grad = grads[0].contiguous()
        into = grad * own.to(x.dtype)
        of_own = torch.dot(grad[:-1].view(-1), x[:-1].reshape(-1)).to(own.dtype).view(1)
        of_weight = torch.zeros_like(weight)
        of_parts = []
        for first, (route, groups, biased) in zip((0, 8), ctx.routes, strict=True):
            conv, scale, gate, offsets, rows, normal, mean, rstd = saved[first : first + 8]
            of_conv, of_bias, of_scale, of_shift, of_gate, of_factor = send_backward(
                grad, x, conv, scale, gate, rows, normal, mean, rstd, route, groups=groups, stats=ctx.stats,
                offsets=offsets, into=into, factor=float(weight),
            )  # fmt: skip
            of_weight += of_factor
            positions = route.layout.positions
            if len(of_gate) < positions:
                of_gate = of_gate.new_zeros(positions).index_copy_(0, route.positions.long(), of_gate)
            of_parts += [of_conv, of_bias if biased else None, of_scale, of_shift, of_gate]
        return into, of_own, of_weight, *of_parts, None, None, None
