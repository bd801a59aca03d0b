"""What is measured: cases, their defaults, and the sets of cases that the goals need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from dyndet.ops.sparse import Impl
from dyndet.structures import Size

from .masks import Mask, density_for

Mode = Literal["conv", "block", "train", "head", "trainhead", "step", "subm"]
MODES: tuple[Mode, ...] = ("conv", "block", "train", "head", "trainhead", "step", "subm")
Norm = Literal["active", "position"]
NORMS: tuple[Norm, ...] = ("active", "position")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Relative error against float64, of the norm over active positions.
LIMITS = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}

# Of an image of 800 x 1333.
_PYRAMID: dict[str, Size] = {"P3": (100, 168), "P4": (50, 84), "P5": (25, 42), "P6": (13, 21), "P7": (7, 11)}
_NAMED: dict[str, tuple[Size, ...]] = {
    "all": tuple(_PYRAMID.values()),
    "bccd": ((30, 40), (15, 20), (8, 10)),  # 240 x 320, the small experiment on blood cells
    "tiny": ((12, 16), (6, 8)),
}


@dataclass(frozen=True)
class Case:
    """One comparison; defaults are those of `conv`.

    Attributes:
        mode: what runs, see `bench_sparse.py`.
        density: share of active positions in percent.
        device: "cpu" or "cuda".
        dtype: a key of `DTYPES`.
        levels: see `shapes_of`.
        batch: images.
        channels: C.
        depth: nodes per branch of a head.
        mask: how positions are drawn.
        impl: execution of the sparse side.
        norm: positions that its norms see.
        macs: share of the multiply-adds that chose the density; None where the density was given.
    """

    mode: Mode
    density: float
    device: str = "cpu"
    dtype: str = "float32"
    levels: str = "P3"
    batch: int = 1
    channels: int = 256
    depth: int = 8
    mask: Mask = "blob"
    impl: Impl = "auto"
    norm: Norm = "active"
    macs: float | None = None

    @property
    def name(self) -> str:
        parts = [self.mode, self.device, self.dtype, self.levels, f"b{self.batch}", f"c{self.channels}"]
        if self.mode in ("head", "trainhead", "step"):
            parts.append(f"d{self.depth}")
        return " ".join([*parts, self.impl, *([self.norm] if self.norm != "active" else []), self.mask])

    @property
    def shapes(self) -> tuple[Size, ...]:
        return shapes_of(self.levels)

    @property
    def groups(self) -> int:
        """Groups of the norms: 32 of 256 channels, as in the papers."""
        return max(1, self.channels // 8)

    @property
    def graphed(self) -> bool:
        """Whether both sides are replayed as CUDA graphs, so that sparsity gets no credit for fewer launches."""
        forward = self.mode in ("block", "head")
        return self.device == "cuda" and self.batch == 1 and forward and self.impl in ("auto", "triton")

    @property
    def limit(self) -> float:
        return LIMITS[self.dtype]

    def tiny(self) -> Case:
        """The same for tests: seconds become milliseconds."""
        return replace(self, levels="tiny", batch=min(self.batch, 2), channels=16, depth=1)


def shapes_of(levels: str) -> tuple[Size, ...]:
    """(H, W) per level of a name ("all", "bccd", "tiny") or of levels separated by commas ("P3,P4").

    Raises:
        ValueError: on another name.
    """
    if levels in _NAMED:
        return _NAMED[levels]
    names = levels.split(",")
    unknown = [name for name in names if name not in _PYRAMID]
    if unknown:
        raise ValueError(f"unknown level {unknown[0]!r}: take {', '.join([*_PYRAMID, *_NAMED])}, or several: P3,P4")
    return tuple(_PYRAMID[name] for name in names)


def defaults(mode: Mode) -> Case:
    """The case that a mode measures unless told otherwise."""
    return {
        "conv": Case("conv", 10),
        "block": Case("block", 10, levels="all"),
        "train": Case("train", 10, levels="P4", batch=2),
        "head": Case("head", 10, levels="all"),
        "trainhead": Case("trainhead", 10, levels="bccd", batch=8, channels=64, depth=2),
        "step": Case("step", 10, levels="bccd", batch=8, channels=64, depth=2),
        "subm": Case("subm", 20, device="cuda", dtype="float16", batch=16, impl="triton"),
    }[mode]


def suite(name: Literal["cpu", "gpu"]) -> list[Case]:
    """The cases behind the goals of `scripts/bench/goals.yaml`."""
    return list(_cpu() if name == "cpu" else _gpu())


def _cpu() -> Iterator[Case]:
    for dtype in ("float32", "bfloat16"):
        for mode in ("conv", "block"):
            yield from _each(replace(defaults(mode), dtype=dtype), 5, 10, 20, 30, 50, 100)
    yield from _each(defaults("train"), 10, 20)
    yield from _each(defaults("step"), 5, 10, 20, 50, 100)
    yield from _each(defaults("head"), 10, 20)


def _gpu() -> Iterator[Case]:
    def cuda(mode: Mode, dtype: str = "bfloat16", impl: Impl = "auto", levels: str = "all", batch: int = 1) -> Case:
        return replace(defaults(mode), device="cuda", dtype=dtype, impl=impl, levels=levels, batch=batch, depth=6)

    yield from _each(cuda("block"), 10, 20, 50)
    yield from _each(cuda("head"), 10, 20)
    head = cuda("head")
    yield replace(head, density=100 * density_for(0.23, head.mask, head.shapes, head.batch), macs=0.23)
    yield from _each(cuda("conv", impl="triton", batch=16), 10, 20, 30, 40, 50, 60, 80, 100)
    yield from _each(cuda("conv", impl="triton", batch=16, levels="P3"), 100)
    yield from _each(cuda("train", impl="triton", batch=4), 10, 20)
    yield from _each(defaults("subm"), 10, 20, 50)


def _each(case: Case, *densities: float) -> Iterator[Case]:
    return (replace(case, density=density) for density in densities)
