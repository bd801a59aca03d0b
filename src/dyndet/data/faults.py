"""Reading many files where some are broken: what is wrong with each, in one error."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from dyndet.errors import DataError, MissingDataError

Item = TypeVar("Item")
Result = TypeVar("Result")

SHOWN = 3
"""Faults that the message tells; all are in the error's `faults`."""


def read_all(read: Callable[[Item], Result], items: Iterable[Item], source: object) -> list[Result]:
    """`read` of every item.

    Raises:
        DataError: that of the only item which has one; one for all where there are several, with `source` before them.
    """
    results: list[Result] = []
    errors: list[DataError] = []
    for item in items:
        try:
            results.append(read(item))
        except DataError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        faults = tuple(map(str, errors))
        kind = MissingDataError if all(isinstance(error, MissingDataError) for error in errors) else DataError
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise kind(f"{source}: {len(faults)} faults: {'; '.join(faults[:SHOWN])}{more}", faults)
    return results
