"""Numbers and texts of json entries, which other programs write as they like."""

from __future__ import annotations

import math
from typing import Any

from dyndet.errors import DataError

Entry = dict[str, Any]


def number(value: object) -> float | None:
    """A number, also one that is written as text; None for anything else. Integers of json have no limit, floats do."""
    if not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except ValueError:
        return None


def whole(entry: Entry, key: str, where: str) -> int:
    """A whole number, also one that is written as a float or text.

    Raises:
        DataError: if there is none.
    """
    value = entry.get(key)
    if isinstance(value, int) and abs(value) < 2**63:
        return value
    try:
        found = int(value) if isinstance(value, str) else number(value)
    except ValueError:
        found = number(value)
    if found is None or not abs(found) < 2**63 or found != int(found):
        raise DataError(f"{where} has {key} {value!r}: give a whole number")
    return int(found)


def text(entry: Entry, key: str, where: str) -> str:
    """A text, also one that is written as a number.

    Raises:
        DataError: if there is none.
    """
    value = entry[key]
    if not isinstance(value, str | int | float):
        raise DataError(f"{where} has {key} {value!r}: give a text")
    return str(value)
