"""Index tables that depend on sizes alone are kept: a detector meets few sizes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Tables = TypeVar("Tables")


def kept(build: Callable[Arguments, Tables], *, number: int = 8) -> Callable[Arguments, Tables]:
    """`build`, which keeps its last results, as far as these hold values and can serve anybody.

    What export makes holds none and belongs to its graph. What validation asks for first must serve training as well,
    which tensors of inference mode could not.

    Args:
        build: of hashable arguments; returns a tensor, or a dataclass or tuple whose tensors are alike.
        number: of results that are kept.
    """
    found: OrderedDict[Hashable, Tables] = OrderedDict()

    @wraps(build)
    def tables(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tables:
        if torch.compiler.is_compiling():
            return build(*args, **kwargs)
        key: Hashable = (args, tuple(kwargs.items()))
        result = found.pop(key, None)
        if result is None:
            with torch.inference_mode(False):
                result = build(*args, **kwargs)
        if _has_values(result):
            found[key] = result
            if len(found) > number:
                found.popitem(last=False)
        return result

    return tables


def _has_values(tables: object) -> bool:
    parts = [tables] if isinstance(tables, Tensor) else tables if isinstance(tables, tuple) else vars(tables).values()
    return all(type(part) is Tensor for part in parts if isinstance(part, Tensor))
