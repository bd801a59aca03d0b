"""A routing gate by gate and level by level: how tests write routings down, and read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dyndet.routing import GatedPath, LayerCost, Routing


@dataclass(frozen=True)
class PathGate:
    """One gate at one level: (B, 1, H, W), and (B, 1, H, W) bool of what is no padding."""

    node: str
    path: str
    level: int
    gate: Tensor
    costs: tuple[LayerCost, ...]
    router_macs: float = 0.0
    valid: Tensor | None = None
    sparse: bool = True

    def mask(self, reach: int = 0) -> Tensor:
        """The positions at which a layer of this reach runs."""
        near = F.max_pool2d(self.gate, 2 * reach + 1, stride=1, padding=reach) > 0
        return near if self.valid is None else near & self.valid

    def positions(self) -> Tensor:
        return torch.ones_like(self.gate).sum((1, 2, 3)) if self.valid is None else self.valid.sum((1, 2, 3))

    def density(self) -> Tensor:
        return (self.gate > 0).sum((1, 2, 3)) / self.positions().clamp(min=1)


def views(routing: Routing) -> list[PathGate]:
    """All gates, path by path, and of each all levels."""
    maps = routing.maps()
    valid = [None] * len(maps) if routing.valid is None else routing.layout.unflat(routing.valid)
    return [
        PathGate(
            path.node, path.path, level, maps[level][:, index : index + 1], path.costs, path.router_macs, valid[level],
            path.sparse,
        )
        for index, path in enumerate(routing.paths)
        for level in range(len(maps))
        if path.on(level)
    ]  # fmt: skip


def routing_of(gates: Sequence[PathGate]) -> Routing:
    """The routing whose `views` these are; a path may be missing on some levels."""
    keys = list(dict.fromkeys((gate.node, gate.path) for gate in gates))
    known = {(gate.node, gate.path, gate.level): gate for gate in gates}
    by_level = {gate.level: gate for gate in gates}
    count = max(by_level) + 1
    paths, maps = [], []
    for key in keys:
        mine = [gate for gate in gates if (gate.node, gate.path) == key]
        levels = tuple(sorted(gate.level for gate in mine))
        first = mine[0]
        paths.append(
            GatedPath(*key, first.costs, first.router_macs, first.sparse, None if len(levels) == count else levels)
        )
    for level in range(count):
        like = by_level[level].gate
        rows = [known[*key, level].gate if (*key, level) in known else torch.zeros_like(like) for key in keys]
        maps.append(torch.cat(rows, 1))
    valid = [by_level[level].valid for level in range(count)]
    return Routing.of(paths, maps, None if valid[0] is None else valid)  # type: ignore[arg-type]
