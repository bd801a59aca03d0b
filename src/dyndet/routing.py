"""What dynamic parts decided on a batch, and what that costs: of gates per position, of a router per image.

Shape legend: B images, C channels, H x W map.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ConvCost:
    """One layer of a gated path.

    Attributes:
        macs: multiply-adds per executed position.
        reach: radius of the receptive field from this layer's output to the path's output; the layer runs wherever an
            open gate lies within that many pixels (the set Omega of Eq. 4, Song et al. 2020).
    """

    macs: float
    reach: int = 0


@dataclass(frozen=True)
class PathGate:
    """What one gate decided at one level: the unit of routing.

    Attributes:
        node: which node of which branch, e.g. "cls.0".
        path: "up", "depth" or "down".
        level: index into the pyramid, finest first.
        gate: (B, 1, H, W) in [0, 1); 0 means not executed.
        costs: the layers of the path.
        router_macs: multiply-adds per position of taking the decision itself; spent whatever is decided.
        valid: (B, 1, H, W) bool, False on padding; None when every position counts.
        sparse: False where closed positions are computed all the same and then multiplied by 0: they count as used.
    """

    node: str
    path: str
    level: int
    gate: Tensor
    costs: tuple[ConvCost, ...]
    router_macs: float = 0.0
    valid: Tensor | None = None
    sparse: bool = True

    def mask(self, reach: int = 0) -> Tensor:
        """(B, 1, H, W) bool: the positions at which a layer of this reach runs."""
        return _dilate(self.gate, reach, self.valid) > 0

    def positions(self) -> Tensor:
        """(B,) number of positions that count."""
        if self.valid is None:
            return torch.full((len(self.gate),), self.gate[0].numel(), device=self.gate.device)
        return self.valid.sum((1, 2, 3))

    def density(self) -> Tensor:
        """(B,) share of valid positions whose gate is open."""
        return (self.gate > 0).sum((1, 2, 3)) / self.positions().clamp(min=1)


def _wide(counts: Tensor) -> Tensor:
    """Float64, which Apple's GPUs do not have: float32 there."""
    return counts.float() if counts.device.type == "mps" else counts.double()


def _dilate(gate: Tensor, reach: int, valid: Tensor | None) -> Tensor:
    if reach == 0:
        return gate
    pooled = F.max_pool2d(gate, 2 * reach + 1, stride=1, padding=reach)
    return pooled if valid is None else pooled * valid


@dataclass(frozen=True)
class Work:
    """What one sparse convolution really computed, over all images and levels of a batch.

    Attributes:
        macs: multiply-adds per row.
        rows: rows that were asked for, a number or an int tensor (1,) that stayed on its device.
        tile: rows are computed in multiples of it.
        dense: every position was computed, whatever was asked for: this many rows; None when only `rows` were.
        node: which node of which branch.
    """

    macs: float
    rows: Tensor | int
    tile: int = 1
    dense: int | None = None
    node: str = ""

    def asked(self) -> Tensor | float:
        """Multiply-adds of the rows that were asked for."""
        return self.rows * self.macs

    def executed(self) -> Tensor | float:
        """Multiply-adds that were taken, tiles included."""
        rows = self.rows if self.dense is None else self.dense
        return -(-rows // self.tile) * self.tile * self.macs


@dataclass
class Routing:
    """Everything a dynamic head decided on a batch. Budgets, reports, pictures and sparse execution read this value.

    All costs are multiply-adds per image, shape (B,): `soft` weighs positions by their gate (differentiable), `used`
    counts executed positions, `full` is what the same head costs with every gate open, `overhead` is what the routers
    themselves cost (in none of the other three, as in the papers).

    Attributes:
        gates: what was decided.
        work: what the gated paths then really computed: tiles and dense executions count in full.
    """

    gates: list[PathGate] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)

    def soft(self, detach: Sequence[str] = ()) -> Tensor:
        """Soft cost; gates of the paths named in `detach` add to the value but get no gradient."""
        return self._sum(lambda gate: gate, detach)

    def used(self) -> Tensor:
        with torch.no_grad():
            return self._sum(lambda gate: (gate > 0).to(gate.dtype), (), dense_counts=True)

    def full(self) -> Tensor:
        with torch.no_grad():
            return self._sum(torch.ones_like, ())

    def overhead(self) -> Tensor:
        return torch.stack([_wide(item.positions()) * item.router_macs for item in self.gates]).sum(0)

    def asked(self) -> Tensor:
        """Multiply-adds of the gated convolutions for the whole batch, where open gates ask for them; scalar."""
        return self._total([item.asked() for item in self.work])

    def executed(self) -> Tensor:
        """Multiply-adds that these convolutions took, scalar, on the device.

        Unlike `used` it knows how they were run: rows come in tiles, and a dense execution computes every position.
        Norms are in neither of the two.
        """
        return self._total([item.executed() for item in self.work])

    def _total(self, costs: Sequence[Tensor | float]) -> Tensor:
        device = self.gates[0].gate.device
        parts = [_wide(torch.as_tensor(cost, device=device).flatten()) for cost in costs]
        return torch.cat(parts).sum() if parts else torch.zeros((), device=device)

    def positions(self) -> Tensor:
        """(B,) positions of the pyramid that were routed."""
        first = self.gates[0]
        return torch.stack(
            [item.positions() for item in self.gates if (item.node, item.path) == (first.node, first.path)]
        ).sum(0)

    def used_ratio(self) -> Tensor:
        """(B,) share of the full cost that was executed."""
        return self.used() / self.full()

    def _sum(self, weigh: Callable[[Tensor], Tensor], detach: Sequence[str], *, dense_counts: bool = False) -> Tensor:
        # Gates of equal geometry are stacked along channels: a few pooled sums instead of one per gate.
        groups: dict[tuple[str, int, tuple[ConvCost, ...], bool], list[PathGate]] = defaultdict(list)
        for item in self.gates:
            groups[item.path, item.level, item.costs, item.sparse].append(item)
        total: Tensor | None = None
        for (path, _, costs, sparse), items in groups.items():
            gate = torch.cat([item.gate for item in items], 1).float()
            weight = weigh(gate.detach() if path in detach else gate)
            if dense_counts and not sparse:
                weight = torch.ones_like(gate)
            if items[0].valid is not None:
                weight = weight * items[0].valid
            for cost in costs:
                part = _wide(_dilate(weight, cost.reach, items[0].valid).sum((1, 2, 3))) * cost.macs
                total = part if total is None else total + part
        if total is None:
            raise ValueError("this routing has no gates, so it has no cost")
        return total


@dataclass
class Routes:
    """Which way every image of a batch took through a cascade.

    Attributes:
        hard: (B,) bool on the CPU: the second detector's answer was asked for.
        easiness: (B,) logits of the router on the CPU; difficulty is 1 - sigmoid. None where no router was asked.
        first: what the first detector's head decided on its images, those that are not hard, in their order.
        second: what the second's decided on the hard ones.
    """

    hard: Tensor
    easiness: Tensor | None = None
    first: Routing | None = None
    second: Routing | None = None

    def parts(self) -> list[tuple[bool, list[int], Routing | None]]:
        """Of either route that was taken: whether it is the hard one, its images, and what its head decided."""
        ways = [(False, (~self.hard).nonzero()[:, 0].tolist(), self.first)]
        ways += [(True, self.hard.nonzero()[:, 0].tolist(), self.second)]
        return [way for way in ways if way[1]]

    def of(self, image: int) -> tuple[Routing | None, int]:
        """What a head decided on an image, and its index in there."""
        for _, indices, routing in self.parts():
            if image in indices:
                return routing, indices.index(image)
        raise IndexError(f"there is no image {image} in this batch")
