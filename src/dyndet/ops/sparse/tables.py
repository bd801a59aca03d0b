"""Index tables of a layout. They depend on sizes alone and are cached: a detector meets few sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from itertools import accumulate
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dyndet.layout import RowLayout

Arguments = ParamSpec("Arguments")
Tables = TypeVar("Tables")


def cached(build: Callable[Arguments, Tables]) -> Callable[Arguments, Tables]:
    """`build` of hashable arguments, whose last results are kept, unless they belong to a graph.

    What export and compilation make belongs to theirs, and in export it holds no values. What validation asks for first
    must serve training as well, which tensors of inference mode could not.
    """

    @lru_cache(maxsize=16)
    def kept(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tables:
        with torch.inference_mode(False):
            return build(*args, **kwargs)

    @wraps(build)
    def tables(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tables:
        fresh = torch.compiler.is_compiling() or type(torch.empty(0)) is not Tensor
        return (build if fresh else kept)(*args, **kwargs)

    return tables


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
def segment(layout: RowLayout) -> Tensor:
    """Int32 (P,): the segment of every position."""
    index = torch.arange(layout.segments, dtype=torch.int32, device=layout.device)
    lengths = torch.tensor(_lengths(layout), device=layout.device)
    return index.repeat_interleave(lengths, output_size=layout.positions)


@cached
def starts(layout: RowLayout) -> Tensor:
    """Int32 (S + 1,): first position of every segment, then P."""
    return torch.tensor([0, *accumulate(_lengths(layout))], dtype=torch.int32, device=layout.device)


@cached
def sending(layout: RowLayout, step: int) -> Tensor:
    """Bool (P,): positions of the levels whose index plus `step` is a level too."""
    mask = torch.zeros(layout.positions, dtype=torch.bool, device=layout.device)
    for level, (start, stop) in enumerate(layout.levels):
        mask[start:stop] = 0 <= level + step < len(layout.shapes)
    return mask


def _lengths(layout: RowLayout) -> list[int]:
    return [height * width for height, width in layout.shapes for _ in range(layout.batch)]
