"""A data loader that survives its processes: one that dies or hangs is named, with the file it read, and all start
again at the same batch, once in a pass over the data.

Keys decide what is drawn, so batches are the same as if nothing had happened.
"""

from __future__ import annotations

import logging
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from dyndet.data.drawing import Drawing, Gather, Loaded
from dyndet.data.quarantine import Quarantine
from dyndet.data.waiting import Waiting
from dyndet.errors import DataError

logger = logging.getLogger(__name__)

STOPPED = 10
"""Seconds after which a process that a signal has stopped is given up."""

_LOOK = 1.0  # seconds between two looks at the processes while a batch is waited for
_END = object()


class Loader(DataLoader[Any]):
    """Batches of drawn samples.

    Args:
        dataset: what is drawn from.
        collate_fn: makes batches of it.
        quarantine: takes in the files that were found to be unusable.
        patience: seconds that a batch is waited for.
        waiting: judges how long training waits for batches; None where nobody minds.
        **kwargs: of a `DataLoader`.
    """

    def __init__(
        self,
        dataset: Drawing,
        *,
        collate_fn: Gather,
        quarantine: Quarantine,
        patience: float = 300,
        waiting: Waiting | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, collate_fn=collate_fn, **kwargs)
        self.drawing = dataset
        self.quarantine = quarantine
        self.patience = patience
        self.waiting = waiting
        self._plan = _Plan()
        self._inner: DataLoader[Any] | None = None
        # Not the last pass itself, which knows its loader: a collector of garbage, which frees such circles, would end
        # the queues of processes before it tells these to end.
        self._last: _Asked | None = None

    def __iter__(self) -> Any:
        # Here and now: a trainer may ask for the iterator before, and for its first batch after, the next epoch begins.
        begun = _Pass(self, list(self.batch_sampler or []))
        self._last = begun.asked
        return begun

    def begin(self, batches: Sequence[Any]) -> tuple[Any, Callable[[], object]]:
        """Sets the processes to these batches; new ones where there are none.

        Returns:
            What gives the batches, and what is to be called before the first: it waits for processes that are there.
        """
        self._plan.batches = batches
        if self._iterator is not None and self._last is not None and self._last.batch is not None:
            self.abandon(self._iterator)  # a thread still waits for a batch that nobody will take
        if self._iterator is not None and self._inner is not None:
            return self._iterator, partial(iter, self._inner)
        self._inner = DataLoader(
            self.dataset,
            batch_sampler=self._plan,  # type: ignore[arg-type]
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            pin_memory=self.pin_memory,
            worker_init_fn=self.worker_init_fn,
            generator=self.generator,
            persistent_workers=self.persistent_workers,
        )
        with _own_sigchld():
            iterator: Any = iter(self._inner)
        self._iterator = iterator if self.persistent_workers else None  # trainers put an end to it
        return iterator, _nothing

    def abandon(self, iterator: Any) -> None:
        """Ends processes that may not answer any more."""
        for process in iterator._workers:
            process.kill()
        for process in iterator._workers:
            process.join(5)
        # Its pipes and threads may never answer either, so that nobody waits for this.
        threading.Thread(target=iterator._shutdown_workers, daemon=True).start()
        self._iterator = None


def _nothing() -> None:
    pass


class _Plan:
    """A batch sampler that others fill."""

    def __init__(self) -> None:
        self.batches: Sequence[Any] = []

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _LostError(Exception):
    """A loader process that is of no use any more."""


@dataclass
class _Asked:
    """What is asked of loader processes.

    Attributes:
        batch: comes here; None when no thread waits for one.
    """

    batch: queue.SimpleQueue[Any] | None = None


class _Pass:
    """One pass over the batches of a loader.

    Attributes:
        asked: of its processes; still so after a pass that was interrupted.
    """

    def __init__(self, loader: Loader, batches: Sequence[Any]) -> None:
        self._loader = loader
        self._batches = batches
        self._done = 0
        self._given = 0
        self._lost: str | None = None
        self._source, self._prepare = loader.begin(batches)
        self.asked = _Asked()

    def __iter__(self) -> _Pass:
        return self

    def __len__(self) -> int:
        return len(self._batches)

    def __next__(self) -> Any:
        waiting = self._loader.waiting
        started = time.monotonic()
        while True:
            loaded = self._load()
            if loaded is None:
                self._refuse_none()
                raise StopIteration
            self._done += 1
            self._loader.quarantine.add(loaded.faults)
            if loaded.error is not None:
                error, loaded = loaded.error, None
                try:
                    raise error
                finally:
                    del error  # else its traceback and this frame keep each other, and with them the processes
            if loaded.batch is not None:
                break  # an empty one is that of an evaluation whose images were all left out
        self._given += 1
        if waiting is not None and (told := waiting.waited(started, time.monotonic())):
            logger.warning("%s", told)
        return loaded.batch

    def _refuse_none(self) -> None:
        if self._batches and not self._given:
            faults = list(self._loader.quarantine.faults.values())
            raise DataError(
                f"none of the {len(self._loader.drawing)} images can be used, for example {faults[-1].reason}"
                if faults
                else "none of the images can be used"
            )

    def _load(self) -> Loaded | None:
        """The next batch, None at the end."""
        if not self._loader.num_workers:
            return next(self._source, None)
        try:
            return self._await()
        except _LostError as lost:
            self._loader.abandon(self._source)
            self.asked.batch = None
            if self._lost is not None:
                raise DataError(
                    f"{lost}; before, {self._lost}: look at the file, and at the memory of this machine "
                    "(data.num_workers=0 loads in the main process, data.timeout is how many seconds are waited)"
                ) from None
            self._lost = str(lost)
            logger.warning(
                "%s: all loader processes start again at batch %d of %d, so that nothing is lost",
                lost, self._done + 1, len(self._batches),
            )  # fmt: skip
            self._source, self._prepare = self._loader.begin(self._batches[self._done :])
            return self._load()

    def _await(self) -> Loaded | None:
        """The next batch of the processes, which a thread receives: a pipe that one of them has left half filled would
        never be waited for in vain otherwise.
        """
        box = self.asked.batch
        if box is None:  # else it was interrupted
            box = self.asked.batch = queue.SimpleQueue()
            arguments = (self._source, self._prepare, box)
            threading.Thread(target=_receive, args=arguments, daemon=True).start()
            self._prepare = _nothing
        waited = stopped = 0.0  # not the clock's: a machine that sleeps stops this process and all others
        looked = time.monotonic()
        while True:
            try:
                loaded = box.get(timeout=_LOOK)
                break
            except queue.Empty:
                now = time.monotonic()
                passed, looked = min(now - looked, 2 * _LOOK), now
                waited += passed
                if told := self._dead():
                    raise _LostError(told) from None
                halted = self._halted()
                stopped = stopped + passed if halted else 0.0
                if stopped >= STOPPED:
                    raise _LostError(f"{halted} was stopped by a signal") from None
                if waited >= self._loader.patience:
                    raise _LostError(self._hanging(waited)) from None
        self.asked.batch = None
        if isinstance(loaded, Exception):
            for _ in range(20):  # a process that has just died is not known to be dead yet
                if told := self._dead():
                    raise _LostError(told) from None
                time.sleep(0.1)
            raise loaded
        return None if loaded is _END else loaded

    def _dead(self) -> str:
        """What became of a process that has ended; empty if none has."""
        workers: Any = self._source
        for number, process in enumerate(workers._workers):
            if not process.is_alive():
                code = process.exitcode or 0
                how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                if -code == getattr(signal, "SIGBUS", None):
                    how += " (shared memory may be full: lower data.num_workers)"
                return f"{self._who(number)} {how}"
        return ""

    def _halted(self) -> str:
        workers: Any = self._source
        numbers = (number for number, process in enumerate(workers._workers) if _is_stopped(process.pid))
        return next(map(self._who, numbers), "")

    def _hanging(self, seconds: float) -> str:
        dataset = self._loader.drawing
        reading = [number for number in range(self._loader.num_workers) if dataset.read_by(number)]
        who = self._who(reading[0]) if reading else "a loader process"
        return f"{who} has given no batch for {seconds:.0f} s (data.timeout)"

    def _who(self, number: int) -> str:
        dataset = self._loader.drawing
        now, last = dataset.read_by(number), dataset.read_last_by(number)
        doing = f"reading {now}" if now else f"the last file it read was {last}" if last else "it had read no file yet"
        return f"loader process {number + 1} of {self._loader.num_workers} ({doing})"


def _receive(source: Iterator[Loaded], prepare: Callable[[], object], box: queue.SimpleQueue[Any]) -> None:
    try:
        prepare()
        box.put(next(source, _END))
    except Exception as error:  # for the main thread to judge
        box.put(error)


def _is_stopped(pid: int) -> bool:
    """Whether a signal has stopped a process, where the system tells."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):
        return False


@contextmanager
def _own_sigchld() -> Iterator[None]:
    """Keeps torch from raising in the midst of a training step, wherever it is, when a loader process ends."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler: Any = signal.getsignal(signal.SIGCHLD)
    if handler is None or getattr(handler, "__module__", "").startswith("torch."):  # of a loader before
        handler = signal.SIG_DFL
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)
