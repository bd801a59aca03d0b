"""Signals that end a command: SIGTERM, SIGINT (Ctrl-C), and SIGUSR1, which SLURM can send before its limit of time.

A command ends where it stands. Training, see `deferred`, goes on to the next place where it can be saved.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import active_children
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any, NoReturn

CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 143}
"""Exit codes: 128 and the number of the signal; a warning that the time is up is what a termination is."""

_OURS = [getattr(signal, name) for name in CODES if hasattr(signal, name)]
_ENDING: set[int] = set()
_FREE = (signal.SIG_DFL, signal.default_int_handler)


class Interrupted(SystemExit):
    """A signal ended the command.

    Attributes:
        name: of the signal.
        told: whether the user has been told already.
    """

    def __init__(self, name: str) -> None:
        super().__init__(CODES[name])
        self.name = name
        self.told = False


@dataclass
class _Received:
    """What this process was asked; there is one, as signals are the process's.

    Attributes:
        name: of the first signal.
        all: names of those that came since.
        raised: whether `Interrupted` was raised for it.
        blocks: how many blocks are listening; the last one forgets what was received.
        deferred: how many blocks are running that signals must not break.
        forward: called once when a signal arrives in such a block.
    """

    name: str | None = None
    all: set[str] = field(default_factory=set)
    raised = False
    blocks = 0
    deferred = 0
    forward: Callable[[], None] | None = None


_RECEIVED = _Received()


@contextmanager
def listening() -> Iterator[None]:
    """Raises `Interrupted` in this block when a signal arrives. Signals that somebody handles or ignores stay his."""
    before: dict[int, object] = {}
    if threading.current_thread() is threading.main_thread():
        for number in _OURS:
            if signal.getsignal(number) in _FREE:
                before[number] = signal.signal(number, _handle)
    hook = sys.unraisablehook
    if before:
        sys.unraisablehook = partial(_raise_again, hook)
    _RECEIVED.blocks += 1
    try:
        yield
    finally:
        _RECEIVED.blocks -= 1
        sys.unraisablehook = hook
        if not _RECEIVED.blocks:
            forget()
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


@contextmanager
def deferred(forward: Callable[[], None] | None = None) -> Iterator[None]:
    """Signals are only noted in this block, which asks `received` where it can stop and then raises `stop`. A second
    Ctrl-C ends the process at once.

    Args:
        forward: told of a signal, once, so that further processes of a run hear of it.

    Raises:
        Interrupted: at the end of the block, where it was not raised within.
    """
    with listening():
        _RECEIVED.deferred += 1
        _RECEIVED.forward = forward
        streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = map(_Lasting, streams)  # type: ignore[assignment]
        try:
            yield
        finally:
            sys.stdout, sys.stderr = streams
            _RECEIVED.deferred -= 1
            _RECEIVED.forward = None
        if _RECEIVED.name is not None and not _RECEIVED.raised:
            stop(_RECEIVED.name)


def received() -> str | None:
    """The signal that asked this process to end, if any did."""
    return _RECEIVED.name


def stop(name: str) -> NoReturn:
    """Raises `Interrupted` for a signal, that of this process if it has received one."""
    _RECEIVED.name, _RECEIVED.raised = _RECEIVED.name or name, True
    raise Interrupted(_RECEIVED.name)


def forget() -> None:
    """What was received is done with."""
    _RECEIVED.name, _RECEIVED.raised = None, False
    _RECEIVED.all.clear()


def leave_to_main_process(*_: object) -> None:
    """For processes that work for this one, such as those of a loader: signals to the whole group are not for them.

    The main process ends them, see `end_workers_at_exit`.
    """
    for number in _OURS:
        signal.signal(number, signal.SIG_IGN)


def end_workers_at_exit() -> None:
    """Ends processes that `leave_to_main_process` when this one ends: asked to, as usual, they would not."""
    if os.getpid() not in _ENDING:
        _ENDING.add(os.getpid())
        Finalize(None, end_workers, exitpriority=10)


def end_workers() -> None:
    """Ends all daemonic processes of this one, at once."""
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch calls the end of a loader's process an error
    for child in active_children():
        if child.daemon:
            child.kill()


def _handle(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    again = name in _RECEIVED.all
    _RECEIVED.all.add(name)
    _RECEIVED.name = _RECEIVED.name or name
    if again and name == "SIGINT":
        _say("interrupted again: ended at once\n")
        end_workers()
        os._exit(CODES[name])
    if not _RECEIVED.deferred:
        stop(name)
    forward, _RECEIVED.forward = _RECEIVED.forward, None
    if forward is not None:
        forward()
    if not again:  # schedulers repeat theirs
        _say(f"{name}: the step is finished and saved first{'; Ctrl-C again ends at once' * (name == 'SIGINT')}\n")


def _raise_again(hook: Callable[[Any], object], unraisable: Any) -> None:
    """Where a signal came while an object was deleted, say, nobody hears of the exception."""
    if isinstance(unraisable.exc_value, Interrupted):
        again = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM))
        again.daemon = True
        again.start()
    else:
        hook(unraisable)


def _say(text: str) -> None:
    with suppress(OSError):  # nobody reads it any more
        os.write(2, f"\n{text}".encode())  # a stream may be in use where the signal came


class _Lasting:
    """A stream that outlives its reader: Ctrl-C ends the `tee` behind a pipe before the run has saved."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._lasting():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._lasting():
            self._stream.flush()

    @contextmanager
    def _lasting(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
