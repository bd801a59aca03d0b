"""What a check says: how bad it is, how often it was found, where, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

MOST_EXAMPLES = 5


@dataclass(frozen=True)
class Place:
    """One place where something was found.

    Attributes:
        split: "train" or "val".
        index: of the image in its split; None where the place is no image of it.
        where: in words: a file, and what in it.
        boxes: (x1, y1, x2, y2) in pixels of the image, of what is meant; none: the whole image.
    """

    split: str
    index: int | None
    where: str
    boxes: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: its name, for instance "duplicate boxes".
        severity: "error": training on it fails or its figures lie; "warning": look at it; "note": good to know.
        text: what was found, in one line.
        count: how many times.
        advice: what to do.
        places: the first or worst few.
    """

    check: str
    severity: Severity
    text: str
    count: int = 0
    advice: str = ""
    places: Sequence[Place] = field(default=())


def first_few(places: Sequence[Place]) -> tuple[Place, ...]:
    """As many as are shown, spread over all of them."""
    count = min(len(places), MOST_EXAMPLES)
    return tuple(places[index * len(places) // count] for index in range(count))


def ranked(findings: Sequence[Finding]) -> list[Finding]:
    """The worst first, otherwise as they came."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def many(count: int, one: str) -> str:
    """A count with its noun: 1 box, 2 boxes."""
    return f"{count} {one}" if count == 1 else f"{count} {one}{'es' * one.endswith('x') or 's'}"
