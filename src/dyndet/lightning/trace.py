"""Where in a step the first value arises that is no number: module by module, forward, then backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dyndet.lightning.nonfinite import any_lost, first_lost


@dataclass
class Trace:
    """What was seen in a step.

    Attributes:
        forward: the first module that gives, or is given, a value that is no number.
        terms: of the loss that are none.
        backward: the module at whose output the first gradient arrives that is none.
        parameter: the first whose gradient is none.
    """

    forward: str = ""
    terms: list[str] = field(default_factory=list)
    backward: str = ""
    parameter: str = ""

    def found(self) -> bool:
        """Whether the step would not have been made."""
        return bool(self.terms or self.parameter)

    def lines(self) -> Iterator[str]:
        """In the order in which things happened."""
        if self.forward:
            yield f"forward: {self.forward}"
        if self.terms:
            yield f"loss: {', '.join(self.terms)}"
        if self.backward:
            yield f"backward: {self.backward}"
        if self.parameter:
            yield f"gradient: of {self.parameter} first, in the order of the parameters"


@contextmanager
def traced(module: nn.Module) -> Iterator[Trace]:
    """Watches a module's parts in this block.

    Args:
        module: whose methods may be called as well as the module itself; parts must be called.
    """
    trace, handles = Trace(), []

    def watch(name: str) -> Any:
        def seen(_: nn.Module, inputs: Any, output: Any) -> None:
            if not trace.forward and lost(output):
                trace.forward = f"{name} is given no numbers" if lost(inputs) else f"{name} makes no numbers of numbers"
            for tensor in tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: arrived(gradient))

        def arrived(gradient: Tensor) -> None:
            if not trace.backward and lost(gradient):
                trace.backward = f"the gradient that arrives at the output of {name} is no number"

        return seen

    for name, part in module.named_modules():
        handles.append(part.register_forward_hook(watch(name or "the detector")))
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def look_at_loss(trace: Trace, terms: dict[str, Tensor]) -> None:
    """Notes the terms that are no numbers."""
    trace.terms += [name for name, value in terms.items() if lost(value) and name not in trace.terms]


def look_at_gradients(trace: Trace, module: nn.Module) -> None:
    """Notes the first parameter whose gradient is no number."""
    trace.parameter = trace.parameter or first_lost((name, p.grad) for name, p in module.named_parameters()) or ""


def lost(values: Any) -> bool:
    """Whether any value in tensors, containers or dataclasses is no number."""
    found = list(tensors(values))
    return any(bool(any_lost([tensor], tensor.device)) for tensor in found)


def tensors(values: Any) -> Iterator[Tensor]:
    """All tensors of floating-point numbers in it."""
    if isinstance(values, Tensor):
        if values.is_floating_point():
            yield values
    elif isinstance(values, dict):
        yield from tensors(list(values.values()))
    elif is_dataclass(values) and not isinstance(values, type):
        yield from tensors([getattr(values, item.name) for item in fields(values)])
    elif isinstance(values, Sequence) and not isinstance(values, str):
        for value in values:
            yield from tensors(value)


@contextmanager
def in_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Computes as a trainer of this `precision` does; "32-true" as usual."""
    kinds = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    if precision not in kinds:
        yield
        return
    with torch.autocast(device.type, dtype=kinds[precision], cache_enabled=False):
        yield
