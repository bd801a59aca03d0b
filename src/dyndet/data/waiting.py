"""Whether training waits for its data most of the time, which is said once."""

from __future__ import annotations

from dyndet.data.workers import cores_here

LEAST = 30.0
"""Seconds of waiting below which nothing is said: a start is no rule."""


class Waiting:
    """Sums up how long batches were waited for, and how long they were worked on in between.

    Args:
        workers: processes that load.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.batches = 0
        self.lost = self.worked = 0.0
        self._until: float | None = None
        self._told = False

    def waited(self, since: float, until: float) -> str:
        """Takes in that a batch was waited for; what there is to say of it, mostly nothing.

        Args:
            since: when it was asked for, in seconds of any clock.
            until: when it came.
        """
        if self._until is not None:  # the first batch waits for the start of processes
            self.batches += 1
            self.worked += since - self._until
            self.lost += until - since
        self._until = until
        whole = self.lost + self.worked
        if self._told or self.lost < LEAST or 2 * self.lost < whole:
            return ""
        self._told = True
        return (
            f"training waits for its data {self.lost / whole:.0%} of the time ({self.lost:.0f} of {whole:.0f} s in "
            f"{self.batches} batches): {self._advice()}"
        )

    def _advice(self) -> str:
        cores = cores_here()
        if self.workers < cores - 1:
            return f"data.num_workers is {self.workers}, and there are {cores} cores: set data.num_workers=auto"
        return (
            f"all {cores} cores load (data.num_workers={self.workers}): shrink large images once, or put them on a "
            "faster disk"
        )
