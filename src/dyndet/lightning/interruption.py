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
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from dyndet.errors import LostProcessError, UserError
from dyndet.signals import Interrupted, received, stop


class Interruption(Checkpoint):
    """Ends a run that was asked to end, see `dyndet.signals`.

    After every batch, at a place where a checkpoint goes on exactly. In a validation after the batch: the checkpoint is
    of the step before it, and a resumed run validates first. Several processes end after the same batch: they tell each
    other in the background, over the CPU, so that nothing waits for a GPU.

    A kind of checkpoint callback because Lightning calls these last.

    Args:
        timeout: seconds that processes of a run wait for each other before they give up.
    """

    def __init__(self, timeout: float = 600) -> None:
        if timeout <= 0:
            raise UserError(f"rank_timeout={timeout}: give a number of seconds")
        self.timeout = timeout
        self._others: Agreement | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        _announce_lost_processes(trainer)
        if trainer.world_size > 1 and stage == "fit":
            self._others = Agreement(self.timeout)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._others is not None:
            self._others.ask(received())

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        name = received() if self._others is None else self._others.answer()
        if name is not None:
            stop(name)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn != "fit":
            return
        name = received()
        if self._others is not None:  # each process answers once in a validation: here, or at its own last batch
            is_last = trainer.fit_loop.epoch_loop.val_loop.batch_progress.is_last_batch
            if name is None and not is_last:
                return
            self._others.ask(name)
            name = self._others.answer()
        if name is not None:
            stop(name)


class Agreement:
    """Whether any process of a run was asked to end.

    Args:
        timeout: in seconds.
    """

    def __init__(self, timeout: float) -> None:
        limit = timedelta(seconds=timeout)
        self._group: Any = dist.new_group(backend="gloo", timeout=limit)
        self._work: Any = None
        self._signals = ("SIGTERM", "SIGINT", "SIGUSR1")
        self._asked = torch.zeros(1, dtype=torch.int64)
        set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        with suppress(RuntimeError, ValueError):  # the run's own group waits half an hour
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
    except Interrupted as interrupted:
        if trainer.is_global_zero:
            last = folder / "checkpoints" / "last.ckpt"
            print(f"interrupted by {interrupted.name} at step {trainer.global_step}: " + how_to_go_on(last), flush=True)
        interrupted.told = True
        raise
    except RuntimeError as error:
        if trainer.world_size > 1 and _of_another_process(error):
            text = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0])  # where in the library
            raise LostProcessError(
                f"another process of this run ended or did not answer ({text[:80]}): what ended it is said above, if "
                "it could. ckpt_path=last goes on from the last checkpoint"
            ) from error
        raise


def how_to_go_on(last: Path) -> str:
    """The command that resumes a run, in the words of the one that started it."""
    arguments = [item for item in sys.argv[1:] if item.lstrip("+").partition("=")[0] != "ckpt_path"]
    if last.is_file():
        command = shlex.join(["python", "-m", "dyndet.train", *arguments, f"ckpt_path={_near(last)}"])
        return f"saved {_near(last)}. To go on:\n  {command}"
    return f"no step was done, so start again:\n  {shlex.join(['python', '-m', 'dyndet.train', *arguments])}"


def _near(path: Path) -> str:
    inside = path.resolve().is_relative_to(Path.cwd())
    return os.path.relpath(path) if inside else str(path.resolve())


def leave_signals_alone(trainer: Trainer) -> None:
    """Lightning handles signals itself, with exchanges between processes amid whatever these are doing; and it asks
    the first process in every step whether one came.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def tell_processes(trainer: Trainer) -> Callable[[], None]:
    """What tells the processes that a trainer has started of a signal that came to this one alone."""

    def tell() -> None:
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            for process in launcher.procs:
                process.terminate()

    return tell


def _announce_lost_processes(trainer: Trainer) -> None:
    """Lightning kills all processes without a word when one it started has ended; here with one."""
    for watch in threading.enumerate():
        if type(watch).__name__ == "_ChildProcessObserver":
            watch._terminate_all = lambda watch=watch: _end(watch)  # type: ignore[attr-defined]


def _end(watch: Any) -> None:
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
