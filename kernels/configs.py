"""Tile shapes, by architecture, arithmetic and number of rows: a table, nothing is tuned at run time.

Few rows want small tiles: one 128x128 tile of a 3x3 convolution over 256 channels keeps a multiprocessor busy for
12 us or more however few tiles there are, and 1 000 rows give 16 of them. Many rows want large tiles, which read each
gathered row less often. The number of rows is unknown on the host, so the choice follows a hint of the density.

The shapes follow from this arithmetic and from the registers and shared memory that the compiler reports
(scripts/compile_kernels.py); sm_80 entries stay below 99 KB so that they fit the small shared memory of 8.6 and 8.9.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import triton

from .launch import Target

# Share of active positions assumed without a hint.
DENSITY = 0.25

# Programs that share the rows of one segment or of one block of a weight gradient, at most.
MOST_SPLITS = 64

Kind = Literal["half", "single", "tf32"]


@dataclass(frozen=True)
class Tile:
    """Block of a GEMM.

    Attributes:
        rows: of the output held by one program.
        columns: of the output held by one program.
        depth: of one step along the summed axis.
        warps: per program.
        stages: of the software pipeline. A gathered load waits for the load of its row number, and the stages are
            shared between the two: 6 are 2 gathers in flight, 8 are 3.
        waves: programs per multiprocessor.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    waves: int


# (architecture, kind) -> tiles with the number of rows up to which they serve, ascending.
Table = dict[tuple[int, Kind], tuple[tuple[float, Tile], ...]]
MANY = float("inf")

CONV: Table = {
    (80, "half"): (
        (2048, Tile(32, 64, 64, 4, 8, 4)),
        (16384, Tile(64, 64, 64, 4, 8, 3)),
        (65536, Tile(64, 128, 64, 4, 6, 3)),
        (MANY, Tile(128, 128, 64, 8, 6, 1)),
    ),
    (90, "half"): (
        (2048, Tile(64, 32, 64, 4, 8, 4)),
        (16384, Tile(64, 64, 64, 4, 8, 3)),
        (65536, Tile(64, 128, 64, 4, 8, 2)),
        (MANY, Tile(128, 256, 64, 8, 6, 1)),
    ),
    (80, "single"): ((2048, Tile(32, 32, 32, 4, 6, 4)), (MANY, Tile(64, 64, 32, 4, 6, 2))),
    (90, "single"): ((2048, Tile(32, 32, 32, 4, 6, 4)), (MANY, Tile(64, 64, 32, 4, 6, 4))),
    (80, "tf32"): ((16384, Tile(32, 64, 32, 4, 8, 4)), (MANY, Tile(128, 64, 32, 4, 6, 2))),
    (90, "tf32"): ((16384, Tile(64, 64, 32, 4, 8, 3)), (MANY, Tile(128, 128, 32, 8, 6, 1))),
}

# Of the weight gradient: rows and columns are output and input channels, depth is rows of the batch.
WEIGHT_GRAD: Table = {
    (80, "half"): ((16384, Tile(64, 64, 64, 4, 6, 3)), (MANY, Tile(128, 128, 64, 8, 6, 1))),
    (90, "half"): ((16384, Tile(64, 64, 64, 4, 6, 3)), (MANY, Tile(128, 128, 64, 8, 6, 2))),
    (80, "single"): ((MANY, Tile(64, 64, 32, 4, 6, 2)),),
    (90, "single"): ((MANY, Tile(64, 64, 32, 4, 6, 4)),),
    (80, "tf32"): ((16384, Tile(64, 64, 32, 4, 6, 3)), (MANY, Tile(128, 128, 32, 8, 6, 1))),
    (90, "tf32"): ((16384, Tile(64, 64, 32, 4, 6, 3)), (MANY, Tile(128, 128, 32, 8, 6, 2))),
}


def tile(table: Table, target: Target, dtype: torch.dtype, positions: int, density: float | None, tf32: bool) -> Tile:
    """Look a tile up.

    Args:
        table: `CONV` or `WEIGHT_GRAD`.
        target: device; 9.0 to 10.x use the entries of sm_90, all others (small shared memory) those of sm_80.
        dtype: of the operands.
        positions: P, the most rows there can be.
        density: expected share of them that is active, None when unknown.
        tf32: round float32 operands to tensor-core precision.
    """
    architecture = 90 if 90 <= target.capability < 110 else 80
    kind: Kind = "half" if dtype != torch.float32 else "tf32" if tf32 else "single"
    rows = positions * (DENSITY if density is None else density)
    return next(tile for limit, tile in table[architecture, kind] if rows <= limit)


def shrink(tile: Tile, *, rows: int | None = None, columns: int | None = None, depth: int | None = None) -> Tile:
    """A tile cut down to the sizes of a problem: no axis longer than its data, no depth that pads much.

    Tensor cores need 16 along every axis. 88 channels in steps of 64 would compute 128, in steps of 32 only 96.
    """
    if depth is not None:
        steps = [step for step in (128, 64, 32, 16) if step <= tile.depth]
        tile = replace(tile, depth=min(steps, key=lambda step: -(-depth // step) * step))
    if rows is not None:
        tile = replace(tile, rows=min(tile.rows, max(16, triton.next_power_of_2(rows))))
    if columns is not None:
        tile = replace(tile, columns=min(tile.columns, max(16, triton.next_power_of_2(columns))))
    return tile


def normalised(tile: Tile, group: int) -> Tile:
    """A tile for the fused norm: it holds whole groups, and leaves registers for a second copy of itself."""
    columns = max(min(tile.columns, 128), group)
    return replace(tile, columns=columns, rows=min(tile.rows, 128 * 128 // columns))


def splits(target: Target, segments: int) -> int:
    """Programs that share the rows of one segment, a power of two: many when there are few segments."""
    return min(max(triton.next_power_of_2(8 * target.multiprocessors // segments), 2), MOST_SPLITS)


def row_splits(target: Target, tile: Tile, programs: int) -> int:
    """Programs that share the rows of each of `programs` blocks of a weight gradient, so that they fill a device."""
    return min(max(target.multiprocessors * tile.waves // programs, 1), MOST_SPLITS)
