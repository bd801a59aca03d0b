"""Errors that a user can mend: the commands print them as one line and exit with a non-zero code."""

from __future__ import annotations


class UserError(ValueError):
    """What was wrong, where, and what to do."""


class DataError(UserError):
    """A dataset file, image or annotation that cannot be used.

    Attributes:
        faults: one message each, where several files are meant.
    """

    def __init__(self, message: str, faults: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.faults = faults


class MissingDataError(DataError):
    """Data that is not where it was looked for."""


class WriteError(UserError):
    """A file that a disk did not take; what was there before is still there."""


class DivergedError(UserError):
    """Training that cannot recover."""


class MemoryShortageError(UserError):
    """There is no more memory, of a device or of the host.

    Attributes:
        doing: what the command was at, "training" for instance.
        images: how many the batch had; 0 before the first.
    """

    def __init__(self, message: str, *, doing: str = "", images: int = 0) -> None:
        super().__init__(message)
        self.doing = doing
        self.images = images


class LostProcessError(UserError):
    """Another process of a run is gone, or does not answer: nothing that waits for it must be tried."""


def reason(error: Exception) -> str:
    """What an exception of another library says, in one line; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    if not lines or str(error).isdigit():
        return type(error).__name__
    if "weights_only" in str(error):  # torch goes on with advice that would run code of the file
        return "it holds more than tensors and plain values, or is no file of torch"
    return lines[0]
