"""Levels exchange features: every level adds what its neighbours sent, resampled to its size, differentiable.

    s = own * x + scale * (down of the finer level + up of the coarser level)

One operation, because each of its terms is a pass over the whole map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyndet.layout import RowLayout
from dyndet.ops.sparse.direct import direct


def exchange_rows(x: Tensor, down: Tensor, up: Tensor, own: Tensor, scale: Tensor, layout: RowLayout) -> Tensor:
    """Adds to every level what its neighbours send.

    `down` of level l travels to the coarser level l + 1, `up` to the finer level l - 1, resampled bilinearly to the
    exact target size with aligned corners. The last `down` and the first `up` have no receiver.

    Args:
        x: (P + 1, C) rows of the pyramid.
        down: (P + 1, C) what goes to coarser levels.
        up: (P + 1, C) what goes to finer levels.
        own: (1,) weight of `x`.
        scale: (1,) weight of what arrives.
        layout: of the rows.

    Returns:
        (P + 1, C), the last row zero.
    """
    return _exchange_rows(x, down.to(x.dtype), up.to(x.dtype), own, scale, layout.sizes)[0]


def _forward(
    x: Tensor, down: Tensor, up: Tensor, own: Tensor, scale: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """-> s, and what was received (P, C)."""
    layout = RowLayout.from_sizes(sizes, x.device)
    received = x.new_empty(layout.positions, x.shape[1])
    downs, ups = layout.maps(down), layout.maps(up)
    for level, (into, shape) in enumerate(zip(layout.maps(received), layout.shapes, strict=True)):
        senders = downs[level - 1 : level] if level else []
        parts = [
            torch.ops.aten.upsample_bilinear2d(sender, list(shape), True)
            for sender in [*senders, *ups[level + 1 :][:1]]
        ]
        if len(parts) == 2:
            torch.add(*parts, out=into)
        elif parts:
            into.copy_(parts[0])
        else:
            into.zero_()
    s = x * own.to(x.dtype)
    s[:-1].addcmul_(received, scale.to(x.dtype))
    return s, received


_registered = torch.library.custom_op("dyndet::exchange_rows", _forward, mutates_args=())


@_registered.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0] - 1, x.shape[1])


def _gradient(
    grad: Tensor, x: Tensor, received: Tensor, own: Tensor, scale: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of x, down, up, own and scale."""
    layout = RowLayout.from_sizes(sizes, x.device)
    grad = grad.contiguous()
    grads = layout.maps(grad)
    of_down, of_up = torch.empty_like(x), torch.empty_like(x)
    for into, step in ((layout.maps(of_down), 1), (layout.maps(of_up), -1)):
        for level, view in enumerate(into):
            target = level + step
            if 0 <= target < len(into):
                torch.mul(
                    torch.ops.aten.upsample_bilinear2d_backward(
                        grads[target], list(grads[target].shape[-2:]), list(view.shape), True
                    ),
                    scale.to(x.dtype),
                    out=view,
                )
            else:
                view.zero_()
    of_down[-1] = 0
    of_up[-1] = 0
    flat = grad[:-1].reshape(-1)
    of_own = torch.dot(flat, x[:-1].reshape(-1)).to(own.dtype).view(1)
    of_scale = torch.dot(flat, received.view(-1)).to(scale.dtype).view(1)
    return grad * own.to(x.dtype), of_down, of_up, of_own, of_scale


_registered_gradient = torch.library.custom_op("dyndet::exchange_rows_backward", _gradient, mutates_args=())


@_registered_gradient.register_fake
def _(grad: Tensor, x: Tensor, received: Tensor, own: Tensor, scale: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return *(torch.empty_like(x) for _ in range(3)), torch.empty_like(own), torch.empty_like(scale)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, _, own, scale, *ctx.rest = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], own, scale)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    gradient = _gradient if getattr(ctx, "direct", False) else _registered_gradient
    return *gradient(grad, *ctx.saved_tensors, *ctx.rest), None


_registered.register_autograd(_backward, setup_context=_setup)
_exchange_rows = direct(_registered, _forward, _setup, _backward)
