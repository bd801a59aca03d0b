"""Small ragged pyramids, and what the tests compare with: dense float64 torch on maps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dyndet import kernels

DEVICE = torch.device("cuda" if os.environ.get("TRITON_INTERPRET") == "0" else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Relative to the largest value, against float64 on the rounded inputs.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Pyramid:
    shapes: Sequence[tuple[int, int]]
    batch: int

    @property
    def total(self) -> int:
        return self.batch * sum(height * width for height, width in self.shapes)

    @property
    def segments(self) -> int:
        return self.batch * len(self.shapes)

    def maps(self, rows: Tensor) -> list[Tensor]:
        """(P, C) -> (B, C, H, W) per level."""
        parts = rows.split([self.batch * height * width for height, width in self.shapes])
        return [
            part.view(self.batch, height, width, -1).permute(0, 3, 1, 2)
            for part, (height, width) in zip(parts, self.shapes, strict=True)
        ]

    def rows(self, maps: Sequence[Tensor]) -> Tensor:
        return torch.cat([level.permute(0, 2, 3, 1).reshape(-1, level.shape[1]) for level in maps])

    @property
    def neighbours(self) -> Tensor:
        maps = self.maps(torch.arange(self.total, dtype=torch.float64)[:, None])
        taps = [F.pad(level, (1, 1, 1, 1), value=self.total) for level in maps]
        taps = [F.unfold(level, 3).view(self.batch, 9, *shape) for level, shape in zip(taps, self.shapes, strict=True)]
        return self.rows(taps).int().to(DEVICE)

    @property
    def segment(self) -> Tensor:
        sizes = [height * width for height, width in self.shapes for _ in range(self.batch)]
        return torch.arange(self.segments, dtype=torch.int32).repeat_interleave(torch.tensor(sizes)).to(DEVICE)

    def conv(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
        """Dense 3x3 convolution of a whole map of rows (P, C)."""
        return self.rows([F.conv2d(level, weight, bias, padding=1, groups=groups) for level in self.maps(rows)])

    def dilated(self, mask: Tensor) -> Tensor:
        maps = self.maps(mask.double()[:, None])
        return self.rows([F.max_pool2d(level, 3, 1, 1) for level in maps])[:, 0] > 0

    def plan(self, gate: Tensor, reach: int) -> kernels.Plan:
        """The plan of a gate, built by plain torch so that each kernel is tested on its own."""
        active = (self.dilated(gate > 0) if reach else gate > 0).cpu()
        order = torch.full((self.total,), -(10**6), dtype=torch.int32)
        index = active.nonzero()[:, 0].int()
        order[: len(index)] = index
        inverse = torch.full((self.total + 1,), self.total, dtype=torch.int32)
        inverse[index.long()] = torch.arange(len(index), dtype=torch.int32)
        starts = torch.searchsorted(
            self.segment.cpu()[index.long()], torch.arange(self.segments + 1, dtype=torch.int32)
        )
        return kernels.Plan(order.to(DEVICE), inverse.to(DEVICE), starts.int().to(DEVICE))


SMALL = Pyramid(((5, 7), (3, 3), (1, 1)), batch=2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype).to(DEVICE)


def random_gate(pyramid: Pyramid, density: float = 0.3, seed: int = 0) -> Tensor:
    noise = torch.rand(pyramid.total, generator=generator(seed))
    return torch.where(noise < density, noise + 0.1, 0.0).to(DEVICE)


def poisoned(values: Tensor, rows: int) -> Tensor:
    """(rows+1, C) with the first rows from values and NaN behind."""
    out = values.new_full((rows + 1, values.shape[1]), float("nan"))
    out[: len(values)] = values
    return out


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    actual = actual.double()
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    if actual.numel():
        error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
        assert error <= tolerance, f"relative error {error:.2e}"
