"""What a broken annotation is, and what is to become of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SIZE = (40, 60)
"""(H, W) of all images."""

FIRST = [10, 10, 30, 20]
SECOND = [40, 10, 50, 30]
"""Boxes of the first image, xyxy; the others have one each."""


@dataclass(frozen=True)
class Case:
    """A broken annotation and its stated outcome.

    Attributes:
        name: of the case.
        change: makes it of a sound set, as the format's module understands it.
        error: part of the line that refuses it; None if it is read.
        boxes: of the first image, if it is read.
        crowd: which of them are crowd; None where that is not asked.
        repairs: what is counted as mended or left out.
        names: of the categories; None where that is not asked.
    """

    name: str
    change: Any
    error: str | None = None
    boxes: Sequence[Sequence[float]] = field(default_factory=lambda: [FIRST, SECOND])
    crowd: list[bool] | None = None
    repairs: dict[str, int] = field(default_factory=dict)
    names: list[str] | None = None
