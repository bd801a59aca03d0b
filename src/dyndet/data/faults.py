"""Reading many files where some are broken: what is wrong with each, in one error, or as a list."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from dyndet.data.quarantine import SKIP, Fault
from dyndet.errors import DataError, MissingDataError

Item = TypeVar("Item")
Result = TypeVar("Result")

SHOWN = 3
"""Faults that the message tells; all are in the error's `faults`."""


def read_all(
    read: Callable[[Item], Result],
    items: Iterable[Item],
    source: object,
    *,
    left_out: list[Fault] | None = None,
    name: Callable[[Item], object] = str,
) -> list[Result]:
    """`read` of every item.

    Args:
        read: raises DataError where an item cannot be used.
        items: what is read.
        source: what they belong to, for messages.
        left_out: gets the faults, and the items that have one are left out; None raises.
        name: the file of an item.

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
            if left_out is not None:
                left_out.append(Fault(str(name(item)), " ".join(str(error).split())))
    if left_out is not None or not errors:
        return results
    if len(errors) == 1:
        raise type(errors[0])(f"{errors[0]}; {SKIP}", errors[0].faults) from errors[0]
    faults = tuple(map(str, errors))
    kind = MissingDataError if all(isinstance(error, MissingDataError) for error in errors) else DataError
    more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    raise kind(f"{source}: {len(faults)} faults: {'; '.join(faults[:SHOWN])}{more}; {SKIP}", faults)
