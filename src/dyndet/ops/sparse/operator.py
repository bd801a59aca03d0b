"""Registered operators: export, compilation and counters see one node, whichever back end executes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from dyndet.ops.sparse.backend import backend

Function = Callable[..., Any]

Gradients = tuple[Tensor | None, ...]
"""What a back end's NAME_backward returns, see `operator`."""

_LIBRARY = torch.library.Library("dyndet", "DEF")
_SAVED = object()  # stands for a tensor


def operator(
    name: str, arguments: str, outputs: str, parse: Function, fake: Function, *, inputs: int = 0, rereads: str = ""
) -> Function:
    """Registers `dyndet::NAME`, which calls NAME of a back end, and `dyndet::NAME_backward` for its gradient.

    Args:
        name: of the operator.
        arguments: as a schema; the last one is "str impl", which says whose NAME is called.
        outputs: as a schema; of several only the first has a gradient.
        parse: the arguments -> those of the back end, plans and norms put together from their parts.
        fake: the arguments -> empty outputs.
        inputs: how many first arguments have a gradient. NAME_backward of the back end takes (grad, needs, outputs,
            *arguments of NAME) and returns these gradients, in any float type; what `needs` does not ask for may be
            None.
        rereads: the flag among the arguments with which NAME_backward reads the first output; it gets an empty one
            otherwise, so that nothing keeps the result alive.
    """
    types = [part.rpartition(" ")[0] for part in arguments.split(", ")]
    flag = arguments.split(", ").index(f"bool {rereads}") if rereads else None

    def run(*values: Any) -> Any:
        return getattr(backend(values[-1]), name)(*parse(*values))

    registered = _register(name, f"({arguments}) -> {outputs}", run, fake)
    if not inputs:
        return registered

    def run_backward(grad: Tensor, needs: Sequence[bool], outputs: Sequence[Tensor], *values: Any) -> list[Tensor]:
        execute = getattr(backend(values[-1]), f"{name}_backward")
        grads = execute(grad.contiguous(), needs, outputs, *parse(*values))
        triples = zip(values, grads, needs, strict=False)
        return [_like(value, found) if needed else grad.new_empty(0) for value, found, needed in triples]

    def fake_backward(grad: Tensor, needs: Sequence[bool], outputs: Sequence[Tensor], *values: Any) -> list[Tensor]:
        pairs = zip(values, needs, strict=False)
        return [torch.empty_like(value) if needed else grad.new_empty(0) for value, needed in pairs]

    schema = f"(Tensor grad, bool[] needs, Tensor[] outputs, {arguments}) -> Tensor[]"
    registered_backward = _register(f"{name}_backward", schema, run_backward, fake_backward)

    def setup(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        outputs = [output] if isinstance(output, Tensor) else list(output)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        if flag is None or not inputs[flag]:
            outputs[0] = outputs[0].new_empty(0)
        leaves, ctx.structure = tree_flatten([outputs, *inputs])
        ctx.save_for_backward(*(leaf for leaf in leaves if isinstance(leaf, Tensor)))
        ctx.others = [_SAVED if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.nothing = [[None] * len(x) if kind == "Tensor[]" else None for x, kind in zip(inputs, types, strict=True)]

    def gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad is None:
            return tuple(ctx.nothing)
        tensors, needs = iter(ctx.saved_tensors), list(ctx.needs_input_grad[:inputs])
        values = tree_unflatten([next(tensors) if leaf is _SAVED else leaf for leaf in ctx.others], ctx.structure)
        found = registered_backward(grad, needs, *values)
        return *(value if needed else None for value, needed in zip(found, needs, strict=True)), *ctx.nothing[inputs:]

    torch.library.register_autograd(f"dyndet::{name}", gradients, setup_context=setup, lib=_LIBRARY)
    return registered


def _register(name: str, schema: str, run: Function, fake: Function) -> Function:
    """Not `torch.library.custom_op`, whose checks for aliases cost as much as a small operation: tests have them."""
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dyndet::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.dyndet, name).default


def _like(value: Tensor, found: Tensor) -> Tensor:
    """In the type and strides of `value`, which compilers count on and optimisers would copy to anyway."""
    found = found.to(value.dtype)
    return found if found.stride() == value.stride() else torch.empty_like(value).copy_(found)
