"""Files of a data set that cannot be used: which, why, and how many are put up with."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dyndet.errors import DataError, UserError

OnError = Literal["raise", "skip"]

SKIP = "data.on_error=skip leaves such files out"
"""The way out, told with every fault that it helps against."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A file that cannot be used.

    Attributes:
        file: its path, or where else it was found.
        reason: in one line.
    """

    file: str
    reason: str


class Quarantine:
    """The faults of a run. Every process has its own; together they write one list.

    Args:
        on_error: "raise" ends at the first unusable file, "skip" leaves it out.
        max_errors: more files than these are an error, too: something else is wrong then.

    Attributes:
        faults: by file, in the order in which they were found.
        file: the list, "file,reason" a line; None until `keep`.

    Raises:
        UserError: if an argument is out of range.
    """

    def __init__(self, on_error: OnError = "raise", max_errors: int = 100) -> None:
        if on_error not in ("raise", "skip"):
            raise UserError(f"data.on_error={on_error}: choose raise or skip")
        if max_errors < 0:
            raise UserError(f"data.max_errors={max_errors}: give a number of files, at least 0")
        self.on_error: OnError = on_error
        self.max_errors = max_errors
        self.faults: dict[str, Fault] = {}
        self.file: Path | None = None

    @property
    def skips(self) -> bool:
        return self.on_error == "skip"

    def keep(self, folder: str | Path) -> None:
        """From now on faults, those so far included, are listed in `quarantine.csv` in this folder."""
        self.file = Path(folder) / "quarantine.csv"
        self._list(self.faults.values())

    def add(self, faults: Iterable[Fault]) -> None:
        """Takes in what was found; a file counts once.

        Raises:
            DataError: if there are more than `max_errors`.
        """
        new = list({fault.file: fault for fault in faults if fault.file not in self.faults}.values())
        if not new:
            return
        self.faults |= {fault.file: fault for fault in new}
        self._list(new)
        if len(self.faults) > self.max_errors:
            where = f", all listed in {self.file}" if self.file else ""
            raise DataError(
                f"{len(self.faults)} files of the data cannot be used, more than data.max_errors={self.max_errors} "
                f"(the last: {new[-1].reason}){where}: mend the data, or allow more with a larger data.max_errors"
            )

    def summary(self) -> str:
        """What was left out, in one line; empty if nothing was."""
        if not self.faults:
            return ""
        first = next(iter(self.faults.values()))
        count = len(self.faults)
        where = f"listed in {self.file}" if self.file else f"for example {first.file}: {first.reason}"
        return f"data: {count} file{'s' * (count > 1)} left out as unusable (data.on_error=skip): {where}"

    def _list(self, faults: Iterable[Fault]) -> None:
        """Adds lines to the list. Other processes and earlier parts of a run add to it, too."""
        if self.file is None:
            return
        known: set[str] = set()
        if self.file.is_file():
            with self.file.open(newline="", encoding="utf-8") as stream:
                known = {row[0] for row in csv.reader(stream) if row}
        new = [fault for fault in faults if fault.file not in known]
        if not new:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", newline="", encoding="utf-8", errors="backslashreplace") as stream:
            writer = csv.writer(stream)
            if not known:
                writer.writerow(["file", "reason"])
            writer.writerows([fault.file, fault.reason] for fault in new)
