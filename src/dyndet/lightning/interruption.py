"""Where a run that is asked to end does so: after a whole step, or amid a validation, which is done again on resume."""

from __future__ import annotations

import os
import re
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from torch.distributed.constants import default_pg_timeout

from dyndet.cli.latest import LAST, step_of
from dyndet.errors import LostProcessError, UserError
from dyndet.signals import Interrupted, received, stop


class Interruption(Callback):
    """Ends a run that was asked to end, see `dyndet.signals`.

    After every batch, at a place where a checkpoint goes on exactly. In a validation after the batch: the checkpoint is
    of the step before it, and a resumed run validates first. Several processes end after the same batch: they tell each
    other in the background, over the CPU, so that nothing waits for a GPU.

    It is to be the last of a trainer's callbacks, see `end_in_order`.

    Args:
        timeout: seconds that processes of a run wait for each other before they give up.
    """

    def __init__(self, timeout: float = 900) -> None:
        if timeout <= 0:
            raise UserError(f"rank_timeout={timeout}: give a number of seconds")
        self.timeout = timeout
        self._others: Agreement | None = None
        self._answered = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size > 1 and stage == "fit":
            own = getattr(trainer.strategy, "_timeout", default_pg_timeout) != default_pg_timeout
            self._others = Agreement(self.timeout, whole_run=not own)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._others is not None:
            self._others.ask(received())

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        name = received() if self._others is None else self._others.answer()
        if name is not None:
            stop(name)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._answered = False

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn == "fit" and received() is not None:
            self._end_validation()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the module's, where processes exchange what they measured."""
        if trainer.state.fn == "fit":
            self._end_validation()

    def _end_validation(self) -> None:
        """Every process asks once in a validation: where it was told to end, or when it is through."""
        name = received()
        if self._others is not None and not self._answered:
            self._answered = True
            self._others.ask(name)
            name = self._others.answer()
        if name is not None:
            stop(name)


class Agreement:
    """Whether any process of a run was asked to end.

    Args:
        timeout: in seconds.
        whole_run: whether that is the time-out of the run's own exchanges as well, torch's half an hour otherwise.
    """

    def __init__(self, timeout: float, *, whole_run: bool = True) -> None:
        limit = timedelta(seconds=timeout)
        self._group: Any = dist.new_group(backend="gloo", timeout=limit)
        self._work: Any = None
        self._signals = ("SIGTERM", "SIGINT", "SIGUSR1")
        self._asked = torch.zeros(1, dtype=torch.int64)
        set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        with suppress(RuntimeError, ValueError):
            if whole_run:
                set_timeout(limit, dist.group.WORLD)

    def ask(self, name: str | None) -> None:
        """Begins to ask; `name` is the signal that this process has received."""
        self._asked.fill_(0 if name is None else 1 + self._signals.index(name))
        self._work = dist.all_reduce(self._asked, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def answer(self) -> str | None:
        """The signal that any process has received."""
        self._work.wait()
        found = int(self._asked)
        return self._signals[found - 1] if found else None


@contextmanager
def ending(trainer: Trainer, folder: Path) -> Iterator[None]:
    """Says of a run that ends early how it goes on, and of one whose processes were lost that it cannot.

    Args:
        trainer: of the run.
        folder: of the run.
    """
    try:
        yield
    except BaseException as error:
        for watch in threading.enumerate():  # processes end with this one: that is no accident any more
            if isinstance(watch, _ChildProcessObserver):
                watch._terminate_all = _nothing  # type: ignore[method-assign]
        if isinstance(error, Interrupted):
            if trainer.is_global_zero:
                last = folder / "checkpoints" / LAST
                text = f"interrupted by {error.name} at step {trainer.global_step}: "
                with suppress(OSError):  # nobody may read it any more
                    print(text + how_to_go_on(last, trainer.global_step), flush=True)
            error.told = True
        elif isinstance(error, RuntimeError) and trainer.world_size > 1 and _of_another_process(error):
            text = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0])  # where in the library
            raise LostProcessError(
                f"another process of this run ended or did not answer ({text[:80]}): what ended it is said above, if "
                "it could. ckpt_path=last goes on from the last checkpoint"
            ) from error
        raise


def how_to_go_on(last: Path, step: int) -> str:
    """The command that resumes a run, in the words of the one that started it.

    Args:
        last: where its last checkpoint should be.
        step: that it should be of.
    """
    others = [item for item in sys.argv[1:] if item.lstrip("+").partition("=")[0] != "ckpt_path"]
    reached = step_of(last) if last.is_file() else -1
    if reached < 0 or (reached != step and len(others) < len(sys.argv[1:])):  # the run had gone on from another file
        again = shlex.join(["python", "-m", "dyndet.train", *sys.argv[1:]])
        return f"nothing was saved since its start, so that the same command goes on:\n  {again}"
    said = f"saved {near(last)}" if reached == step else f"{near(last)} is of step {reached}"
    return f"{said}. To go on:\n  {shlex.join(['python', '-m', 'dyndet.train', *others, f'ckpt_path={near(last)}'])}"


def near(path: Path) -> str:
    """A path as short as it can be written."""
    inside = path.resolve().is_relative_to(Path.cwd())
    return os.path.relpath(path) if inside else str(path.resolve())


def end_in_order(trainer: Trainer, interruption: Interruption) -> None:
    """Makes `Interruption` the last of a trainer's callbacks, behind those that save."""
    trainer.callbacks.append(interruption)  # type: ignore[attr-defined]
    leave_signals_alone(trainer)


def leave_signals_alone(trainer: Trainer) -> None:
    """Lightning handles signals itself, with exchanges between processes amid whatever these are doing; and it asks
    the first process in every step whether one came.
    """
    trainer._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]
    _ChildProcessObserver._terminate_all = _end  # type: ignore[method-assign]


def _nothing() -> None:
    """A function of a module, which can be sent to other processes."""


def tell_processes(trainer: Trainer) -> Callable[[], None]:
    """What tells the processes that a trainer has started of a signal that came to this one alone."""

    def tell() -> None:
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher | _MultiProcessingLauncher):
            for process in launcher.procs:
                process.terminate()

    return tell


def _end(watch: Any) -> None:
    """Lightning kills all processes without a word when one that it started has ended; here with one."""
    children = watch._child_processes
    codes = {rank: process.returncode for rank, process in enumerate(children, start=1) if process.returncode}
    if not codes:  # forgotten meanwhile: the run has ended
        return
    lost = ", ".join(f"process {rank} with code {code}" for rank, code in codes.items())
    os.write(
        2, f"\nerror: {lost} ended, and the run with it: ckpt_path=last goes on from its last checkpoint\n".encode()
    )
    for process in children:
        process.kill()
    os._exit(1)


def _of_another_process(error: RuntimeError) -> bool:
    words = ("gloo", "nccl", "closed by peer", "reset by peer", "timed out", "timeout", "unhandled system error")
    text = f"{type(error).__name__} {error}".lower()
    return any(word in text for word in words)
