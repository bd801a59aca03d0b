"""How much was computed: executed multiply-adds per image, and which gates did the deciding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dyndet.ops.flops import GIGA
from dyndet.routing import Routing

GateKey = tuple[str, str, int]
"""Node, path and level of a gate."""

REFERENCE_POSITIONS = 22_400  # of an 800x1344 image on strides 8 to 128, where the papers quote costs


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, smallest and largest value over the images; nan when there were none."""

    mean: float = math.nan
    min: float = math.nan
    max: float = math.nan

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(math.fsum(values) / len(values), min(values), max(values)) if values else cls()


@dataclass(frozen=True)
class ComputeReport:
    """Compute over a set of images, in multiply-adds per image.

    Attributes:
        images: number of images.
        head: used by the head's open gates, routers not counted (as in the papers).
        full: what the head costs with every gate open.
        reference: what the executed share would cost at 800x1344, the size of the published tables; nan for a static
            head, whose cost `count_macs` gives.
        total: executed by the whole detector, routers included.
        overhead: mean cost of the routers.
        parts: mean of every static part.
        executed: multiply-adds that the gated convolutions took per image, tiles and dense runs included.
        asked: what of it was asked for.
        ratio: mean over images of head / full.
        ratio_of_sums: head / full of all images together.
        soft_ratio: mean over images of the soft cost / full.
        open: share of open positions of each gate, mean over images (each weighs the same).
        dead: gates that never opened on any image.
        always_open: gates that were open everywhere on every image.
        hard: share of the images that a dynamic detector sent to its second detector; None without one.
        level_names: e.g. P3; levels beyond them are called L<index>.
    """

    images: int
    head: Spread
    full: Spread
    reference: Spread
    total: Spread
    overhead: float
    parts: dict[str, float]
    executed: float
    asked: float
    ratio: float
    ratio_of_sums: float
    soft_ratio: float
    open: dict[GateKey, float]
    dead: list[GateKey]
    always_open: list[GateKey]
    hard: float | None = None
    level_names: tuple[str, ...] = ()

    def gate_name(self, key: GateKey) -> str:
        """E.g. cls.0.depth/P3."""
        node, path, level = key
        return f"{node}.{path}/{self.level_names[level] if level < len(self.level_names) else f'L{level}'}"

    def as_scalars(self) -> dict[str, float]:
        """Flat names for loggers: `macs/...` and the open share of every gate under `gates/...`."""
        scalars = {
            f"macs/{name}_{kind}": getattr(spread, kind)
            for name, spread in (
                ("head_used", self.head),
                ("total", self.total),
                *([("head_reference", self.reference)] if self.open else []),
            )
            for kind in ("mean", "min", "max")
        }
        scalars |= {
            "macs/head_full_mean": self.full.mean,
            "macs/head_ratio": self.ratio,
            "macs/head_ratio_of_sums": self.ratio_of_sums,
            "macs/head_soft_ratio": self.soft_ratio,
            "macs/overhead_mean": self.overhead,
        }
        if self.hard is not None:
            scalars["route/hard"] = self.hard
        scalars |= {f"macs/{part}_mean": value for part, value in self.parts.items() if part != "head"}
        scalars |= {f"gates/{self.gate_name(key)}": share for key, share in self.open.items()}
        if self.open:
            if self.executed > 0:  # heads of one's own may not say
                scalars |= {"macs/head_executed_mean": self.executed, "macs/head_asked_mean": self.asked}
            scalars |= {"gates/dead": float(len(self.dead)), "gates/always_open": float(len(self.always_open))}
        return scalars

    def as_table(self) -> list[dict[str, str]]:
        """Rows as in Table 1 of Song et al. 2020: head and total, mean, max and min in GMAC per image."""
        rows = [("head", self.head), ("total", self.total)]
        if self.open:
            rows.append(("head at 800x1344", self.reference))
        return [
            {"GMAC": name} | {kind: f"{getattr(spread, kind) / GIGA:.3f}" for kind in ("mean", "max", "min")}
            for name, spread in rows
        ]


@dataclass(slots=True)
class _Image:
    """Multiply-adds spent on one image."""

    used: float
    soft: float
    full: float
    overhead: float
    reference: float
    parts: dict[str, float]
    hard: bool | None

    @property
    def total(self) -> float:
        static = math.fsum(value for part, value in self.parts.items() if part != "head")
        return self.used + self.overhead + static  # the static part of the head is in `used`


@dataclass(slots=True)
class _Tally:
    """Density of one gate over the images."""

    count: int = 0
    sum: float = 0.0
    min: float = math.inf
    max: float = -math.inf

    def add(self, other: _Tally) -> None:
        self.count += other.count
        self.sum += other.sum
        self.min = min(self.min, other.min)
        self.max = max(self.max, other.max)


@dataclass
class _State:
    images: list[_Image] = field(default_factory=list)
    gates: dict[GateKey, _Tally] = field(default_factory=dict)
    executed: float = 0.0
    asked: float = 0.0

    def add(self, other: _State) -> None:
        self.images += other.images
        self.executed += other.executed
        self.asked += other.asked
        for key, tally in other.gates.items():
            self.gates.setdefault(key, _Tally()).add(tally)


class ComputeMeter:
    """Sums up what every image cost. Under DDP `compute` covers the images of all processes, and all must call it.

    Args:
        strides: of the pyramid, finest first; a level is named P<log2 stride>.
        level_names: names to use instead.
    """

    def __init__(self, *, strides: Sequence[int] = (), level_names: Sequence[str] | None = None) -> None:
        self.level_names = tuple(level_names) if level_names is not None else pyramid_names(strides)
        self._state = _State()

    def reset(self) -> None:
        self._state = _State()

    def update(
        self, routing: Routing | None, static: Sequence[Mapping[str, float]], *, hard: bool | None = None
    ) -> list[float]:
        """Adds a batch and returns the total multiply-adds of each of its images.

        Args:
            routing: what the head decided, None for a static head.
            static: for each image, multiply-adds of every part that always runs. The part named "head" counts as head:
                its unconditional layers, or all of it when the head is static.
            hard: the way these images took through a dynamic detector.

        Raises:
            ValueError: if routing and static disagree on the number of images.
        """
        costs = torch.zeros(5, len(static), dtype=torch.float64)
        if routing is not None:
            if routing.layout.batch != len(static):
                raise ValueError(f"routing has {routing.layout.batch} images, static costs have {len(static)}")
            costs = self._read(routing)
        images = []
        for parts, (used, soft, full, overhead, to_reference) in zip(static, costs.T.tolist(), strict=True):
            head = float(parts.get("head", 0.0))
            numbers = {part: float(value) for part, value in parts.items()}
            used = used + head
            images.append(_Image(used, soft + head, full + head, overhead, used * to_reference, numbers, hard))
        self._state.images += images
        return [image.total for image in images]

    def compute(self) -> ComputeReport:
        """The report over all images since the last reset; nan where there were none."""
        state = _gathered(self._state)
        images, gates = state.images, _by_node(state.gates)
        used, full = [image.used for image in images], [image.full for image in images]
        names = dict.fromkeys(part for image in images for part in image.parts)
        return ComputeReport(
            images=len(images),
            head=Spread.of(used),
            full=Spread.of(full),
            reference=Spread.of([image.reference for image in images if gates]),
            total=Spread.of([image.total for image in images]),
            overhead=Spread.of([image.overhead for image in images]).mean,
            parts={name: Spread.of([image.parts.get(name, 0.0) for image in images]).mean for name in names},
            executed=state.executed / len(images) if images else math.nan,
            asked=state.asked / len(images) if images else math.nan,
            ratio=Spread.of([image.used / image.full for image in images if image.full]).mean,
            ratio_of_sums=math.fsum(used) / math.fsum(full) if any(full) else math.nan,
            soft_ratio=Spread.of([image.soft / image.full for image in images if image.full]).mean,
            open={key: tally.sum / tally.count for key, tally in gates.items()},
            dead=[key for key, tally in gates.items() if tally.max == 0],
            always_open=[key for key, tally in gates.items() if tally.min == 1],
            hard=_share([image.hard for image in images if image.hard is not None]),
            level_names=self.level_names,
        )

    @torch.no_grad()
    def _read(self, routing: Routing) -> Tensor:
        """Used, soft, full and router costs and the way to the reference size, (5, B); all in one copy to the host."""
        layout = routing.layout
        per_image = [routing.used(), routing.soft(), routing.full(), routing.overhead()]
        per_image.append(REFERENCE_POSITIONS / routing.positions())
        parts = [*per_image, routing.executed(), routing.asked(), routing.densities()]
        flat = torch.cat([part.flatten().to(per_image[0].dtype) for part in parts]).cpu().double()
        costs, work, densities = flat.split([5 * layout.batch, 2, len(flat) - 5 * layout.batch - 2])
        self._state.executed += float(work[0])
        self._state.asked += float(work[1])
        rows = densities.view(len(routing.paths), len(layout.shapes), layout.batch).tolist()
        for path, levels in zip(routing.paths, rows, strict=True):
            for level, row in enumerate(levels):
                if path.on(level):
                    tally = _Tally(len(row), sum(row), min(row), max(row))
                    self._state.gates.setdefault((path.node, path.path, level), _Tally()).add(tally)
        return costs.view(5, layout.batch)


def _by_node(gates: dict[GateKey, _Tally]) -> dict[GateKey, _Tally]:
    """Node by node, each with its paths, as they came up first."""
    nodes, paths = (list(dict.fromkeys(key[index] for key in gates)) for index in (0, 1))
    return dict(sorted(gates.items(), key=lambda item: (nodes.index(item[0][0]), paths.index(item[0][1]), item[0][2])))


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def pyramid_names(strides: Sequence[int]) -> tuple[str, ...]:
    """P<log2 stride> of each level, e.g. P3 for stride 8."""
    return tuple(f"P{math.log2(stride):g}" for stride in strides)


def _gathered(state: _State) -> _State:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return state
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, state)
    merged = _State()
    for part in parts:
        merged.add(part)
    return merged
