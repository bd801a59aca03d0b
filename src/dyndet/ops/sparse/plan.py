"""Which rows to compute: the active positions of a mask, in order.

    positions   3  4  9 12  .  .       row n computes position positions[n]
    inverse     .  .  .  0  1  .  .  .  .  2  .  .  3      the row of a position, or capacity ("nothing there")
    offsets     0 .. N                 first row of every segment; the last entry is the number of rows

Where the number of rows is known on the host (CPU), the capacity is exactly N. Elsewhere it is P, N stays on the
device, nothing waits for it, and rows from N on are undefined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dyndet.layout import RowLayout
from dyndet.ops.sparse.backend import Impl, resolve
from dyndet.ops.sparse.operator import operator
from dyndet.ops.sparse.tables import cached, starts


@dataclass(frozen=True)
class Plan:
    """Active positions of a layout.

    Attributes:
        layout: of the positions.
        positions: int32 (capacity,), see above.
        inverse: int32 (P + 1,); inverse[P] = capacity.
        offsets: int32 (S + 1,).
        whole: every position is active, so that rows are the map itself.
        expected: share of active positions that somebody expects, where the host does not know it.
    """

    layout: RowLayout
    positions: Tensor
    inverse: Tensor
    offsets: Tensor
    whole: bool = False
    expected: float | None = None

    @classmethod
    def of(cls, tensors: Sequence[Tensor], layout: RowLayout, expected: float | None = None) -> Plan:
        """The plan of a layout that has these `tensors`."""
        if not tensors:
            return whole_plan(layout)
        positions, inverse, offsets = tensors
        return cls(layout, positions, inverse, offsets, expected=expected)

    @property
    def tensors(self) -> list[Tensor]:
        """Positions, inverse and offsets, as operators take them; none stand for the whole map."""
        return [] if self.whole else [self.positions, self.inverse, self.offsets]

    @property
    def capacity(self) -> int:
        return self.positions.shape[0]

    @property
    def exact(self) -> bool:
        """Whether the host knows the row count: it is the capacity."""
        return self.whole or self.capacity < self.layout.positions

    @property
    def density(self) -> float | None:
        """Share of active positions: known where the plan is exact, else what was expected."""
        return self.capacity / max(1, self.layout.positions) if self.exact else self.expected

    @property
    def rows(self) -> int:
        """The number of rows, for the host: read from the device where the plan is not exact."""
        return self.capacity if self.exact else int(self.count)

    @property
    def count(self) -> Tensor:
        """Int32 (1,): the number of rows, on the device."""
        return self.offsets[-1:]

    def bounds(self) -> list[tuple[int, int]] | None:
        """First and last + 1 row of every level, where the host knows them without waiting."""
        if self.whole:
            return self.layout.levels
        if not (self.exact and self.offsets.is_cpu):
            return None
        return list(pairwise(self.offsets[:: self.layout.batch].tolist()))

    def positions_reached(self) -> int:
        """Positions of the levels that have rows, of all as long as the host does not know."""
        levels = self.layout.levels
        pairs = zip(levels, self.bounds() or levels, strict=True)
        return sum(stop - start for (start, stop), (first, last) in pairs if last > first)

    def check(self, impl: str) -> None:
        """Raises ValueError where Triton kernels were to run rows of a plan without room for every position."""
        if impl == "triton" and self.capacity < self.layout.positions:
            raise ValueError("this plan was made for another execution: make it and use it with the same impl")


@cached
def whole_plan(layout: RowLayout) -> Plan:
    """Every position of the layout: rows are the map."""
    index = torch.arange(layout.positions + 1, dtype=torch.int32, device=layout.device)
    return Plan(layout, index[:-1], index, starts(layout), whole=True)


def make_plans(
    gate: Tensor,
    layout: RowLayout,
    *,
    valid: Tensor | None = None,
    reaches: Sequence[int] = (0,),
    expected: float | Sequence[float | None] | None = None,
    impl: Impl = "auto",
) -> list[Plan]:
    """Plans of the positions with an open gate within `reach`.

    Args:
        gate: (P,), open where > 0 (or bool).
        layout: of the positions.
        valid: (P,) bool, positions that may be active; None allows all.
        reaches: 0 for the open positions themselves, 1 for their 3x3 neighbourhood; one plan each.
        expected: share of open positions, of which every reach is derived, or one share per reach; what to expect
            where they are counted on the device.
        impl: "triton" (or "auto" on CUDA) counts on the device without waiting.

    Returns:
        One plan per reach. Tensors without values (meta) give whole ones.

    Raises:
        UserError: where the kernels were asked for and cannot run.
    """
    if not isinstance(expected, Sequence):
        expected = [reached(expected, reach) for reach in reaches]
    how = resolve(impl, gate.device)
    exact = how == "torch" and not torch.compiler.is_compiling()
    tensors = _plan(gate, valid, layout.sizes, list(reaches), exact, how)
    if not exact:
        pairs = list(zip(tensors, _room(layout), strict=True))
        tensors = [part[index, :length] for index in range(len(reaches)) for part, length in pairs]
    plans = []
    for index, share in enumerate(expected):
        trio = tensors[3 * index : 3 * index + 3]
        plans.append(Plan.of([] if exact and not len(trio[1]) else trio, layout, share))
    return plans


def reached(density: float | None, reach: int) -> float | None:
    """The share of positions within `reach` of open gates, of compact ones: of 10 % about 22 %, of 30 % 56 %."""
    return density if density is None or not reach else 1 - (1 - density) ** (1 + 1.3 * reach)


def _parse(gate: Tensor, valid: Tensor | None, sizes: list[int], reaches: list[int], exact: bool, _: str) -> Any:
    return gate, valid, RowLayout.from_sizes(sizes, gate.device), reaches, exact


def _fake(
    gate: Tensor, valid: Tensor | None, sizes: list[int], reaches: list[int], exact: bool, _: str
) -> list[Tensor]:
    if exact:
        return [gate.new_empty(0, dtype=torch.int32) for _ in range(3 * len(reaches))]
    lengths = _room(RowLayout.from_sizes(sizes, gate.device))
    return [gate.new_empty(len(reaches), -(-length // 64) * 64, dtype=torch.int32) for length in lengths]


def _room(layout: RowLayout) -> tuple[int, int, int]:
    return layout.positions, layout.positions + 1, layout.segments + 1


# Positions, inverse and offsets: where the host is to know the count, of every reach, empty ones of whole plans;
# otherwise of all reaches in one, (reaches, P), (reaches, P + 1) and (reaches, S + 1) with room up to multiples of 64.
_arguments = "Tensor gate, Tensor? valid, SymInt[] sizes, int[] reaches, bool exact, str impl"
_plan = operator("plan", _arguments, "Tensor[]", _parse, _fake)
