"""What all operators share: the short way to them, their type under autocast, and its precision.

The operators are registered with `torch.library`, so that `torch.compile`, export and counters see one opaque node
each. That costs about half a millisecond per call and gradient, more than small maps take; on ordinary tensors the same
functions are therefore called through `torch.autograd.Function`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dyndet.ops.sparse.execute import triton
from dyndet.ops.sparse.impl import Impl

Function = Callable[..., Any]


def direct(registered: Any, forward: Function, setup: Function, backward: Function) -> Function:
    """`registered`, or the same function without the dispatcher where nobody needs to see an operator.

    Args:
        registered: the `torch.library` operator, its gradient registered.
        forward: its implementation.
        setup: (ctx, inputs, output) of its gradient.
        backward: (ctx, *gradients) of its gradient; `ctx.direct` tells that it may call implementations.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            ctx.direct = True
            output = forward(*args)
            setup(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

    def call(first: Tensor, *args: Any) -> Any:
        return Direct.apply(first, *args) if ordinary(first) else registered(first, *args)

    return call


def in_one_piece(x: Tensor, impl: Impl) -> bool:
    """Whether several operators on `x` may run as one function, because nobody needs to see them one by one."""
    return ordinary(x) and not triton.chosen(impl, x.device)


def ordinary(x: Tensor) -> bool:
    """Whether nobody needs to see operators on `x`: it holds values, is no subclass, and nothing is being compiled."""
    return type(x) in (Tensor, nn.Parameter) and not x.is_meta and not torch.compiler.is_compiling()


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The type in which autocast would multiply `x`; its own where there is none."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def allows_tf32(dtype: torch.dtype) -> bool:
    """Whether torch lets convolutions of this type round float32 to TF32 for tensor cores, as it does by default.

    That is `torch.backends.cudnn.conv.fp32_precision`, which `torch.backends.cudnn.allow_tf32` sets as well: a sparse
    convolution is to have the precision of the dense one that it stands for. Read it where an operator is called, and
    hand it on as an argument: a graph that is compiled or exported then holds what was true at that time.
    """
    return dtype == torch.float32 and _convolutions_round()


@torch.compiler.assume_constant_result
def _convolutions_round() -> bool:
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # pyright: ignore[reportAttributeAccessIssue]
