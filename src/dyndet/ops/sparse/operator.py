"""Registered operators with gradients, declared once: export, compilation and counters see one node either way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Function = Callable[..., Any]

_SAVED = object()  # stands for a tensor


def operator(name: str, forward: Function, fake: Function, backward: Function, *, inputs: int) -> Function:
    """Registers `dyndet::NAME`, and `dyndet::NAME_backward` for its gradient.

    Args:
        name: of the operator.
        forward: the annotated implementation; of several outputs only the first has a gradient.
        fake: the same arguments -> empty outputs.
        backward: (grad, needs, outputs, *arguments of `forward`) -> gradients of its first arguments, in any float
            type; those that `needs` does not ask for may be None.
        inputs: how many first arguments have a gradient.
    """
    name = f"dyndet::{name}"
    schema = torch.library.infer_schema(forward, mutates_args=())
    arguments = schema[1 : schema.index(") ->")]
    registered = torch.library.custom_op(name, forward, mutates_args=(), schema=schema)
    registered.register_fake(fake)

    def gradient(grad: Tensor, needs: Sequence[bool], outputs: Sequence[Tensor], *values: Any) -> list[Tensor]:
        grads = backward(grad.contiguous(), needs, outputs, *values)
        return [
            found.to(value.dtype) if needed else grad.new_empty(0)
            for value, found, needed in zip(values, grads, needs, strict=False)
        ]

    def fake_gradient(grad: Tensor, needs: Sequence[bool], outputs: Sequence[Tensor], *values: Any) -> list[Tensor]:
        pairs = zip(values, needs, strict=False)
        return [value.new_empty(value.shape) if needed else grad.new_empty(0) for value, needed in pairs]

    of_gradient = f"(Tensor grad, bool[] needs, Tensor[] outputs, {arguments}) -> Tensor[]"
    registered_gradient = torch.library.custom_op(f"{name}_backward", gradient, mutates_args=(), schema=of_gradient)
    registered_gradient.register_fake(fake_gradient)

    def setup(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        outputs = [output] if isinstance(output, Tensor) else list(output)
        ctx.mark_non_differentiable(*outputs[1:])
        leaves, ctx.structure = tree_flatten([outputs, *inputs])
        ctx.save_for_backward(*(leaf for leaf in leaves if isinstance(leaf, Tensor)))
        ctx.others = [_SAVED if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        lists = [x if isinstance(x, list) and all(isinstance(item, Tensor) for item in x) else None for x in inputs]
        ctx.rest = [None if x is None else [None] * len(x) for x in lists]

    def gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        tensors, needs = iter(ctx.saved_tensors), list(ctx.needs_input_grad[:inputs])
        values = tree_unflatten([next(tensors) if leaf is _SAVED else leaf for leaf in ctx.others], ctx.structure)
        found = registered_gradient(grad, needs, *values)
        return *(value if needed else None for value, needed in zip(found, needs, strict=True)), *ctx.rest[inputs:]

    registered.register_autograd(gradients, setup_context=setup)
    return registered
