"""What dynamic parts decided on a batch, and what that costs: of gates per position, of a router per image.

Legend: B images, L levels, P positions of all levels and images, S = L x B segments, G gates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from dyndet.layout import RowLayout


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One layer of a gated path.

    Attributes:
        macs: multiply-adds per executed position.
        reach: radius of the receptive field from this layer's output to the path's output; the layer runs wherever an
            open gate lies within that many pixels (the set Omega of Eq. 4, Song et al. 2020).
    """

    macs: float
    reach: int = 0


@dataclass(frozen=True, slots=True)
class GatedPath:
    """What one gate decides about.

    Attributes:
        node: which node of which branch, e.g. "cls.0".
        path: e.g. "up", "depth" or "down".
        costs: the layers of the path.
        router_macs: multiply-adds per position of taking the decision itself; spent whatever is decided.
        sparse: False where closed positions are computed all the same and then multiplied by 0: they count as used.
        levels: of the pyramid, finest is 0, on which it exists; None for all.
    """

    node: str
    path: str
    costs: tuple[LayerCost, ...]
    router_macs: float = 0.0
    sparse: bool = True
    levels: tuple[int, ...] | None = None

    def on(self, level: int) -> bool:
        """Whether it exists on this level."""
        return self.levels is None or level in self.levels


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


@dataclass(frozen=True)
class Routing:
    """Everything a dynamic head decided on a batch. Budgets, reports, pictures and sparse execution read this value.

    All costs are multiply-adds per image, shape (B,): `soft` weighs positions by their gate (differentiable), `used`
    counts executed positions, `full` is what the same head costs with every gate open, `overhead` is what the routers
    themselves cost (in none of the other three, as in the papers).

    Attributes:
        layout: where the positions lie.
        paths: G of them; neighbours of equal costs are summed together.
        gates: (G, P) in [0, 1]; 0 means not executed, and is what holds where a path does not exist or is padded.
        valid: (P,) bool, False on padding; None when every position counts.
        work: what the gated paths then really computed: tiles and dense executions count in full.
    """

    layout: RowLayout
    paths: tuple[GatedPath, ...]
    gates: Tensor
    valid: Tensor | None = None
    work: list[Work] = field(default_factory=list)

    @classmethod
    def of(cls, paths: Sequence[GatedPath], maps: Sequence[Tensor], valid: Sequence[Tensor] | None = None) -> Routing:
        """From gates as maps.

        Args:
            paths: G of them.
            maps: L x (B, G, H, W).
            valid: L x (B, 1, H, W) bool; gates on padding are closed.
        """
        layout = RowLayout.of(maps)
        gates = layout.flat(maps)
        area = None if valid is None else layout.flat(valid)[0]
        return cls(layout, tuple(paths), gates if area is None else gates * area, area)

    def soft(self, detach: Sequence[str] = ()) -> Tensor:
        """Soft cost; gates of the paths named in `detach` add to the value but get no gradient."""
        return self.per_image(self.spread(lambda path, gate: gate.detach() if path.path in detach else gate))

    def used(self) -> Tensor:
        return self.per_image(self.spent())

    def full(self) -> Tensor:
        return self._everywhere(lambda path: sum(cost.macs for cost in path.costs))

    def overhead(self) -> Tensor:
        return self._everywhere(lambda path: path.router_macs)

    def used_ratio(self) -> Tensor:
        """(B,) share of the full cost that was executed."""
        return self.used() / self.full()

    def asked(self) -> Tensor:
        """Multiply-adds of the gated convolutions for the whole batch, where open gates ask for them; scalar."""
        return self._sum(item.asked() for item in self.work)

    def executed(self) -> Tensor:
        """Multiply-adds that these convolutions took, scalar, on the device.

        Unlike `used` it knows how they were run: rows come in tiles, and a dense execution computes every position.
        Norms are in neither of the two.
        """
        return self._sum(item.executed() for item in self.work)

    def positions(self) -> Tensor:
        """(B,) positions of the pyramid that count."""
        counts = self._counts()
        return counts.to(_wide(counts)).view(len(self.layout.shapes), self.layout.batch).sum(0)

    def densities(self) -> Tensor:
        """(G, S) share of the valid positions of every segment whose gate is open."""
        return self.layout.per_segment((self.gates.detach() > 0).float()) / self._counts().clamp(min=1)

    def maps(self) -> list[Tensor]:
        """The gates as L x (B, G, H, W), views."""
        return self.layout.unflat(self.gates)

    def spent(self) -> Tensor:
        """(P,) multiply-adds of every position; they sum to `used`."""
        with torch.no_grad():
            return self.spread(lambda path, gate: (gate > 0).float() if path.sparse else self._everything(path, gate))

    def possible(self) -> Tensor:
        """(P,) multiply-adds of every position with every gate open; they sum to `full`."""
        with torch.no_grad():
            return self.spread(self._everything)

    def spread(self, weigh: Callable[[GatedPath, Tensor], Tensor]) -> Tensor:
        """(P,) costs, each layer's wherever the weight of its path reaches.

        Args:
            weigh: of a path and the gates (n, P) of n neighbours like it -> their weights, of the same shape.
        """
        parts = []
        for path, gates in self._runs():
            weights = weigh(path, gates)
            parts += [
                self._reached(weights, cost.reach).sum(0, dtype=_wide(weights)) * cost.macs for cost in path.costs
            ]
        if not parts:
            raise ValueError("this routing has no gates, so it has no cost")
        return sum(parts[1:], parts[0])

    def per_image(self, values: Tensor) -> Tensor:
        """(P,) -> (B,) sums."""
        return self.layout.per_segment(values[None]).view(len(self.layout.shapes), self.layout.batch).sum(0)

    def named(self, prefix: str) -> Routing:
        """The same decisions, told apart from those of another detector."""
        paths = tuple(replace(path, node=prefix + path.node) for path in self.paths)
        return replace(self, paths=paths, work=[replace(item, node=prefix + item.node) for item in self.work])

    def _runs(self) -> Iterator[tuple[GatedPath, Tensor]]:
        """Neighbouring gates that cost the same and are called alike: the first path, and their rows."""
        start = 0
        for _, same in groupby(self.paths, lambda path: (path.path, path.costs, path.sparse, path.levels)):
            run = list(same)
            yield run[0], self.gates[start : start + len(run)].float()
            start += len(run)

    def _everything(self, path: GatedPath, gates: Tensor) -> Tensor:
        weights = torch.ones_like(gates)
        for level, (start, stop) in enumerate(self.layout.levels):
            if not path.on(level):
                weights[:, start:stop] = 0
        return weights if self.valid is None else weights * self.valid

    def _reached(self, weights: Tensor, reach: int) -> Tensor:
        """(n, P) weights, each the largest within `reach` of its position."""
        if reach == 0:
            return weights
        levels = self.layout.unflat(weights)
        pooled = self.layout.flat([F.max_pool2d(x, 2 * reach + 1, stride=1, padding=reach) for x in levels])
        return pooled if self.valid is None else pooled * self.valid

    def _counts(self) -> Tensor:
        """(S,) valid positions of every segment."""
        area = self.gates.new_ones(self.layout.positions) if self.valid is None else self.valid
        return self.layout.per_segment(area[None].float())[0]

    def _everywhere(self, macs: Callable[[GatedPath], float]) -> Tensor:
        """(B,) what paths cost that run on all valid positions of their levels."""
        levels = range(len(self.layout.shapes))
        prices = [sum(macs(path) for path in self.paths if path.on(level)) for level in levels]
        counts = self._counts().view(len(self.layout.shapes), self.layout.batch)
        wide = counts.to(_wide(counts))
        return torch.stack([count * price for count, price in zip(wide, prices, strict=True)]).sum(0)

    def _sum(self, costs: Iterable[Tensor | float]) -> Tensor:
        """Scalar; what the host knows needs no copy."""
        total = self.gates.new_zeros(1, dtype=_wide(self.gates))
        for cost in costs:
            total = total + cost
        return total[0]


def _wide(values: Tensor) -> torch.dtype:
    """Float64, which Apple's GPUs do not have: float32 there."""
    return torch.float32 if values.device.type == "mps" else torch.float64


@dataclass
class Routes:
    """Which of the two ways every image of a batch took.

    Attributes:
        hard: (B,) bool on the CPU: the second detector's answer was asked for.
        difficulty: (B,) logits of the router on the CPU. None where no router was asked.
        first: what the first detector's head decided on its images, those that are not hard, in their order.
        second: what the second's decided on the hard ones.
    """

    hard: Tensor
    difficulty: Tensor | None = None
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
