"""A row of docs/reliability.md: one kind of fault, injected many times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """What became of one injected fault.

    Attributes:
        case: which one, in a few words.
        survived: whether the promise held.
        said: what was seen instead, where it did not.
    """

    case: str
    survived: bool
    said: str = ""


@dataclass(frozen=True)
class Row:
    """One kind of fault and what is promised of it.

    Attributes:
        id: of the row, R1.1 for instance.
        fault: what is done, in one line.
        promise: what holds of every case that survives, in one line.
        inject: called with an empty folder; yields outcomes one by one, different kinds first, so that the first few
            are a fair sample.
        seconds: roughly what all of it takes on one core, for the order in which rows run.
    """

    id: str
    fault: str
    promise: str
    inject: Callable[[Path], Iterator[Outcome]]
    seconds: float = 60
