"""The scale step of a node: every level adds what its neighbours send, gates included, differentiable.

s = own * x + weight * (resampled g_down * norm(down * x) of the finer level + g_up * norm(up * x) of the coarser)
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from dyndet.ops.sparse.conv import conv_rows, conv_work
from dyndet.ops.sparse.direct import autocast_dtype, in_one_piece
from dyndet.ops.sparse.exchange import exchange_rows
from dyndet.ops.sparse.execute.norm import Stats
from dyndet.ops.sparse.execute.send import Shipment, send, send_backward
from dyndet.ops.sparse.impl import Impl
from dyndet.ops.sparse.parameters import ConvNorm
from dyndet.ops.sparse.place import place_rows
from dyndet.ops.sparse.plan import Plan, whole_plan
from dyndet.routing import Work


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
    x = x.to(autocast_dtype(x))
    if in_one_piece(x, impl) and all(plan.exact for plan in plans):
        parts = down.to(x.dtype), up.to(x.dtype)
        tensors = [value for part, gate in zip(parts, gates, strict=True) for value in (*part[:4], gate)]
        return _ScaleStep.apply(x, own, weight, *tensors, plans, parts, stats)
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
    if not (in_one_piece(x, impl) and all(plan.exact for plan in plans)):
        return work
    bounds = plans[0].layout.levels
    exact = []
    for item, plan, step in zip(work, plans, _STEPS, strict=True):
        sent = _shipments(plan, step)
        rows = sum(shipment.rows.stop - shipment.rows.start for shipment in sent)
        exact.append(replace(item, rows=rows, dense=sum(bounds[x.level][1] - bounds[x.level][0] for x in sent)))
    return exact


_STEPS = (1, -1)  # down goes to the next level, up to the one before


def _shipments(plan: Plan, step: int) -> list[Shipment]:
    """Of every level that has rows in the plan and a receiver, `step` levels on."""
    layout, offsets = plan.layout, plan.offsets.tolist()
    found = []
    for level, (start, stop) in enumerate(layout.levels):
        bounds = offsets[level * layout.batch : (level + 1) * layout.batch + 1]
        rows = slice(bounds[0], bounds[-1])
        number = rows.stop - rows.start
        if number and 0 <= level + step < len(layout.shapes):
            index = None if number == stop - start else plan.positions[rows].long() - start
            found.append(Shipment(level, level + step, rows, index, [bound - rows.start for bound in bounds]))
    return found


class _ScaleStep(torch.autograd.Function):
    """Both directions in one piece; see `execute.send`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, own: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        *tensors, plans, parts, ctx.stats = rest
        s = x * own.to(x.dtype)
        maps, sums = plans[0].layout.maps(x), plans[0].layout.maps(s)
        saved, states = [x, own, weight], []
        ctx.directions = []
        for first, step, plan, part in zip((0, 5), _STEPS, plans, parts, strict=True):
            conv, bias, scale, shift, gate = tensors[first : first + 5]
            path = ConvNorm(conv, bias, scale, shift, part.groups, part.eps)
            opened = gate if plan.whole else gate.index_select(0, plan.positions)
            saved += [conv, bias, scale, shift, opened]
            sent = _shipments(plan, step)
            for item in sent:
                states += send(maps, path, opened[item.rows], item, sums, float(weight), ctx.stats)
            ctx.directions.append((plan, sent, part.groups, part.eps))
        ctx.save_for_backward(*saved, *states)
        return s

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, own, weight, *saved = ctx.saved_tensors
        states = iter(saved[10:])
        grad = grads[0].contiguous()
        of_x = grad * own.to(x.dtype)
        of_own = torch.dot(grad[:-1].view(-1), x[:-1].reshape(-1)).to(own.dtype).view(1)
        of_weight = torch.zeros_like(weight)
        layout = ctx.directions[0][0].layout
        maps, sums, grad_maps = layout.maps(x), layout.maps(of_x), layout.maps(grad)
        of_parts: list[Tensor | None] = []
        for first, (plan, sent, groups, eps) in zip((0, 5), ctx.directions, strict=True):
            conv, bias, scale, shift, opened = saved[first : first + 5]
            path = ConvNorm(conv, bias, scale, shift, groups, eps)
            of_values = [None if value is None else torch.zeros_like(value) for value in path[:4]]
            of_opened = torch.zeros_like(opened)
            for item in sent:
                *of_path, of_gate, of_factor = send_backward(
                    grad_maps, maps, path, opened[item.rows], item, list(islice(states, 4)), sums, float(weight),
                    ctx.stats,
                )  # fmt: skip
                for total, value in zip(of_values, of_path, strict=True):
                    if total is not None:
                        total += value
                of_opened[item.rows] = of_gate
                of_weight += of_factor
            if not plan.whole:
                of_opened = of_opened.new_zeros(layout.positions).index_copy_(0, plan.positions.long(), of_opened)
            of_parts += [*of_values, of_opened]
        return of_x, of_own, of_weight, *of_parts, None, None, None
