"""Disks that take nothing: R4. Small file systems of their own where this process may mount them (root)."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from dyndet.cli.latest import latest_checkpoint, step_of
from dyndet.disk import FAULTS
from dyndet.errors import WriteError
from dyndet.lightning.writing import CheckpointFiles, WritePolicy
from dyndet.sealed import fault
from faults.files import TINY
from faults.row import Outcome, Row

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from commands import forked  # pyright: ignore[reportMissingImports]

RUN = [
    *[key for key in TINY if not key.startswith(("logger", "~callbacks.preview"))], "+experiment=shapes_dyn",
    "trainer.max_epochs=6", "hydra.run.dir=outputs/shapes_dyn/now",
]  # fmt: skip
LARGE, SMALL = 400, 38
"""MB: one checkpoint takes some 12 MB, so that the small one holds the best, the last and no third."""


class At(Callback):
    """Does something to the disk at a step: "full", "room", "closed", "open", "limit" (on the size of files),
    "neighbour" (which takes whatever becomes free).
    """

    def __init__(self, steps: dict[int, str], folder: str) -> None:
        self.steps, self.folder = steps, Path(folder)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        what = self.steps.get(trainer.global_step)
        filler = self.folder / "filler"
        if what == "full":
            with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(bytes(1 << 16)):
                    pass
        elif what == "room":
            filler.unlink(missing_ok=True)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        elif what in ("closed", "open"):
            mode = "ro" if what == "closed" else "rw"
            subprocess.run(["mount", "-o", f"remount,{mode}", str(self.folder)], check=True)
        elif what == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
        elif what == "neighbour":
            subprocess.Popen([sys.executable, "-c", _NEIGHBOUR, str(filler), str(os.getpid())])


_NEIGHBOUR = """
import os, sys, time
file = open(sys.argv[1], "ab", buffering=0)
while os.path.exists(f"/proc/{sys.argv[2]}"):
    try:
        file.write(bytes(1 << 16))
    except OSError:
        time.sleep(0.0005)
"""

# What happens to the disk by step, whether the run ends well under stop and under go_on.
FATES: dict[str, tuple[dict[int, str], bool, bool]] = {
    "full": ({9: "full"}, False, False),
    "full, room again": ({9: "full", 21: "room"}, False, True),
    "a neighbour takes what becomes free": ({9: "neighbour"}, False, False),
    "closed": ({9: "closed"}, False, False),
    "closed, open again": ({9: "closed", 21: "open"}, False, True),
    "a limit on files": ({9: "limit"}, False, False),
    "a limit on files, lifted": ({9: "limit", 21: "room"}, False, True),
}


def runs(folder: Path) -> Iterator[Outcome]:
    """Training runs whose disk does not take a file from the second epoch on."""
    torch.set_num_threads(1)
    for (name, (steps, stop, go_on)), policy in itertools.product(FATES.items(), ("stop", "go_on")):
        needs_mount = "limit" not in name
        with disk(folder, LARGE) as mounted:
            if needs_mount and not mounted:
                continue
            yield _run(f"{name}, {policy}", folder, steps, policy, well=go_on if policy == "go_on" else stop)
    for policy, size in itertools.product(("stop", "go_on"), (SMALL - 12, SMALL)):
        with disk(folder, size) as mounted:
            if mounted:
                yield _run(f"room for {size} MB, {policy}", folder, {}, policy, well=False)


def _run(case: str, folder: Path, steps: dict[int, str], policy: str, *, well: bool) -> Outcome:
    """A run, and one that goes on from it where there is room."""
    small = folder / "outputs"
    what = ",".join(f"{step}: {action}" for step, action in steps.items())
    at = f"+callbacks.at={{_target_: {__name__}.At, steps: {{{what}}}, folder: {small}}}"
    quiet = ["hydra/job_logging=disabled"] if "closed" in case else []  # an open file would keep the disk open
    result = forked(folder, "train", *RUN, f"on_write_error={policy}", at, *quiet)
    faulty = _faulty(result, well)
    with contextlib.chdir(folder):
        path, skipped = latest_checkpoint("shapes_dyn")
        reached = step_of(path) if path else -1
        torn = [str(file) for file in small.rglob("*.ckpt") if fault(file) is not None]
    if well and reached != 36:
        faulty = faulty or f"ends at step {reached}"
    if torn or skipped or path is None:
        faulty = faulty or f"torn: {torn}, skipped: {skipped}, taken: {path}"
    if not faulty and not well:  # with room again it goes on
        subprocess.run(["mount", "-o", f"remount,rw,size={LARGE}m", str(small)], check=False, capture_output=True)
        (small / "filler").unlink(missing_ok=True)
        again = forked(folder, "train", *RUN[:-1], "ckpt_path=last", f"trainer.max_steps={reached + 1}")
        faulty = _faulty(again, well=True)
    return Outcome(case, not faulty, faulty or f"goes on from step {reached}")


def _faulty(result: CompletedProcess[str], well: bool) -> str:
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    if "Traceback" in result.stderr + result.stdout:
        return f"a traceback: {result.stderr[-300:]}"
    if well:
        return "" if result.returncode == 0 and not errors else f"exit {result.returncode}: {result.stderr[-300:]}"
    return "" if result.returncode == 2 and len(errors) == 1 else f"exit {result.returncode}: {errors}"


@contextlib.contextmanager
def disk(folder: Path, size: int) -> Iterator[bool]:
    """A file system of its own under `folder`/outputs, in MB; False, and a plain folder, where there can be none."""
    small = folder / "outputs"
    small.mkdir(exist_ok=True)
    line = ["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", str(small)]
    try:
        mounted = subprocess.run(line, check=False, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(small)], check=True)
        else:
            subprocess.run(["rm", "-rf", str(small)], check=True)


CALLS = ("open", "write", "fsync", "replace", "link")


def faults_of_calls(folder: Path) -> Iterator[Outcome]:
    """Every error of every call of a save, under either policy."""
    content = {"w": torch.ones(10_000)}
    last = folder / "checkpoints" / "last.ckpt"
    for policy, call, number in itertools.product(("stop", "go_on"), CALLS, sorted(FAULTS)):
        files = CheckpointFiles(WritePolicy(policy))
        files.save_checkpoint({**content, "global_step": 1}, last)
        said = ""
        with failing(call, number):
            try:
                files.save_checkpoint({**content, "global_step": 2}, last)
            except WriteError as error:
                said = str(error)
        step = step_of(last)
        if call == "link":  # there are other ways
            good = step == 2 and not said
        else:
            good = step == 1 and bool(said) == (policy == "stop") and "\n" not in said
        good = good and fault(last) is None and not list(last.parent.glob("*.part"))
        if call != "link":
            files.save_checkpoint({**content, "global_step": 3}, last)  # the next save is tried again
            good = good and step_of(last) == 3 and not files.lost
        yield Outcome(f"{errno.errorcode[number]} of {call}, {policy}", good, said)


@contextlib.contextmanager
def failing(call: str, number: int) -> Iterator[None]:
    """Makes a call of saving fail."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    def fail_to_write(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" not in mode:
            return opened(self, mode, *args, **kwargs)
        return fail() if call == "open" else opened(Path("/dev/full"), mode)

    opened: Callable[..., Any] = Path.open
    place: Any = Path if call in ("open", "write") else os
    name = "open" if call in ("open", "write") else call
    before = getattr(place, name)
    setattr(place, name, fail_to_write if place is Path else fail)
    try:
        yield
    finally:
        setattr(place, name, before)


def permission(folder: Path) -> Iterator[Outcome]:
    """A folder of somebody else."""
    for policy, mode in itertools.product(("stop", "go_on"), (0o555, 0o500, 0o000)):
        with tempfile.TemporaryDirectory(dir=folder) as name:
            last = Path(name, "checkpoints", "last.ckpt")
            files = CheckpointFiles(WritePolicy(policy))
            files.save_checkpoint({"global_step": 1}, last)
            last.parent.chmod(mode)
            said = _as_nobody(partial(files.save_checkpoint, {"global_step": 2}, last))
            last.parent.chmod(0o755)
            good = step_of(last) == 1 and ("Permission denied" in said) == (policy == "stop") and "\n" not in said
            yield Outcome(f"mode {mode:o}, {policy}", good, said)


def _as_nobody(task: Callable[[], object]) -> str:
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        task()
    except WriteError as error:
        return str(error)
    finally:
        os.seteuid(user)
    return ""


_KEPT = "the last good checkpoint stays, one line, exit 2 or, by on_write_error=go_on, the next save is tried"
ROWS = [
    Row("R4.1", "a disk that is full or closed under a training run", f"{_KEPT}; then ckpt_path=last", runs, 150),
    Row("R4.2", "every error of every call of a save", _KEPT, faults_of_calls, 10),
    Row("R4.3", "a folder of somebody else", _KEPT, permission, 5),
]
