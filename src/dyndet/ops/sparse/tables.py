"""Index tables of a layout. They depend on sizes alone and are cached: a detector meets few sizes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial, wraps
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dyndet.layout import RowLayout

Arguments = ParamSpec("Arguments")
Tables = TypeVar("Tables")


def cached(build: Callable[Arguments, Tables], *, number: int = 8) -> Callable[Arguments, Tables]:
    """`build`, whose last results are kept, as far as these hold values and can serve anybody.

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


@cached
def neighbours(layout: RowLayout) -> Tensor:
    """Int32 (P, 9): the 3x3 neighbourhood of every position, row-major; P outside the map."""
    tables = []
    for (start, stop), (height, width) in zip(layout.levels, layout.shapes, strict=True):
        position = torch.arange(start, stop, dtype=torch.int32, device=layout.device)
        grid = position.view(layout.batch, height, width)
        padded = F.pad(grid, (1, 1, 1, 1), value=layout.positions)
        taps = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        tables.append(torch.stack(taps, -1).view(-1, 9))
    return torch.cat(tables)


@cached
def neighbours_by_tap(layout: RowLayout) -> tuple[Tensor, Tensor]:
    """Int32 (9 P,) twice. Into values that lie tap by tap, (9, P + 1): for every tap and position, the place where
    its neighbour keeps what it holds for this tap. Into one value per position, (P + 1,): the neighbour on the
    opposite side.
    """
    taps = neighbours(layout).t()
    first = torch.arange(9, dtype=torch.int32, device=layout.device)[:, None] * (layout.positions + 1)
    return (taps + first).reshape(-1), taps.flip(0).reshape(-1)


@cached
def segment(layout: RowLayout) -> Tensor:
    """Int32 (P,): the segment of every position."""
    parts = [
        torch.arange(layout.batch, dtype=torch.int32, device=layout.device).repeat_interleave(height * width)
        + level * layout.batch
        for level, (height, width) in enumerate(layout.shapes)
    ]
    return torch.cat(parts)


@cached
def starts(layout: RowLayout) -> Tensor:
    """Int32 (S + 1,): first position of every segment, then P."""
    sizes = [height * width for height, width in layout.shapes for _ in range(layout.batch)]
    bounds = [0]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    return torch.tensor(bounds, dtype=torch.int32, device=layout.device)


@partial(cached, number=16)  # two of a layout
def sending(layout: RowLayout, step: int) -> Tensor:
    """Bool (P,): positions of the levels whose index plus `step` is a level too."""
    mask = torch.zeros(layout.positions, dtype=torch.bool, device=layout.device)
    for level, (start, stop) in enumerate(layout.levels):
        mask[start:stop] = 0 <= level + step < len(layout.shapes)
    return mask
