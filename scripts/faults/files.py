"""Files that are killed, cut and flipped: R3 and R5."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dyndet.checkpoints.read import read_checkpoint, resume_path
from dyndet.checkpoints.start_from import start_from
from dyndet.cli.compose import compose_experiment
from dyndet.cli.latest import latest_checkpoint, step_of
from dyndet.errors import UserError
from dyndet.lightning.lesson_files import LessonFile
from dyndet.lightning.router_module import Lesson
from dyndet.lightning.writing import CheckpointFiles
from dyndet.sealed import fault, read_sealed, write_sealed
from dyndet.train import train
from faults.row import Outcome, Row

TINY = [
    "data.size=64", "data.train_images=24", "data.val_images=2", "data.batch_size=4", "trainer.accelerator=cpu",
    "neck.channels=16", "head=plain_small", "head.num_convs=1", "~callbacks.progress", "~callbacks.preview",
    "~callbacks.density", "logger=[]", "~callbacks.learning_rate",
]  # fmt: skip
KILLS, TRAININGS, FLIPS, CUTS = 50, 3, 200, 100


def trained(folder: Path, *keys: str) -> Path:
    """The checkpoint of a run of a few steps in `folder`."""
    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        train(compose_experiment("shapes_dyn", [*TINY, f"output_dir={folder}", "trainer.max_steps=2", *keys]))
    return folder / "checkpoints" / "last.ckpt"


def kills(elsewhere: str | None, folder: Path) -> Iterator[Outcome]:
    """Saves in a loop, killed at a random moment; then training runs."""
    rng = random.Random(3)
    content = torch.load(trained(folder / "first"), weights_only=True)
    with tempfile.TemporaryDirectory(dir=elsewhere) as place, contextlib.chdir(place):
        run = Path("outputs", "loop", "now", "checkpoints")
        for number in range(KILLS):
            acknowledged = _killed(partial(_save, content, run, step_of(run / "last.ckpt") + 1), rng.random() * 0.2)
            yield _whole(f"kill {number} in a loop", "loop", content["state_dict"], acknowledged)
        for number in range(TRAININGS):
            shutil.rmtree("outputs")
            place = Path("outputs", "shapes_dyn", "now")
            _killed(partial(_train, place), 0.1 + rng.random())
            outcome = _whole(f"kill {number} of a training run", "shapes_dyn", None, 0)
            if outcome.survived:
                path, _ = latest_checkpoint("shapes_dyn")
                step = step_of(path or Path())
                trained(place, "ckpt_path=last", f"trainer.max_steps={step + 2}")
                went_on = step_of(place / "checkpoints" / "last.ckpt") == step + 2
                outcome = Outcome(outcome.case, went_on, "" if went_on else "it did not go on")
            yield outcome


def _save(content: dict[str, Any], run: Path, step: int, pipe: int) -> None:
    files = CheckpointFiles()
    while True:
        content["global_step"] = step
        files.save_checkpoint(content, run / "last.ckpt")
        os.write(pipe, f"{step}\n".encode())
        if step % 3 == 0:
            files.save_checkpoint(content, run / "best.ckpt")
        step += 1


def _train(place: Path, pipe: int) -> None:
    os.write(pipe, b"0\n")
    trained(place, "trainer.max_steps=1000", "trainer.max_epochs=-1", "callbacks.last.every_n_train_steps=1")


def moments(folder: Path) -> Iterator[Outcome]:
    """Killed before and after every call to the disk that puts a file into its place, with hard links and without."""
    content = {"state_dict": {"w": torch.ones(1000)}, "global_step": 0}
    with contextlib.chdir(folder):
        for links, after, number in itertools.product((True, False), (False, True), range(8)):
            shutil.rmtree("outputs", ignore_errors=True)
            run = Path("outputs", "loop", "now", "checkpoints")
            for step in (1, 2):
                CheckpointFiles().save_checkpoint({**content, "global_step": step}, run / "last.ckpt")
            if (child := os.fork()) == 0:
                _dies_at(number, after=after, links=links)
                CheckpointFiles().save_checkpoint({**content, "global_step": 3}, run / "last.ckpt")
                os._exit(0)
            os.waitpid(child, 0)
            case = f"{'after' if after else 'before'} call {number}{'' if links else ', no links'}"
            yield _whole(case, "loop", content["state_dict"], 2)


def _dies_at(number: int, *, after: bool, links: bool) -> None:
    """Makes this process kill itself at a call."""
    calls = itertools.count()

    def dying(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        this = next(calls) == number
        if this and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        if call is link and not links:
            raise PermissionError(1, "no links here")
        result = call(*args, **kwargs)
        if this:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    link = os.link
    for name in ("fsync", "link", "replace", "unlink"):
        setattr(os, name, partial(dying, getattr(os, name)))


def _killed(task: Callable[[int], object], after: float) -> int:
    """Runs a task in a copy of this process, kills it some seconds after its first line; returns the last number that
    it wrote.
    """
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            task(writing)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as lines:
        first = lines.readline()
        deadline = time.monotonic() + 60
        while not list(Path().glob("outputs/*/*/checkpoints/last.ckpt")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return int([first, *lines.read().split("\n")[:-1]][-1])


def _whole(case: str, name: str, weights: dict[str, Any] | None, acknowledged: int) -> Outcome:
    """Every file under its name is whole, and the newest is what was saved last, or the one that was on its way."""
    torn = [str(file) for file in Path("outputs").rglob("*.ckpt") if fault(file) is not None]
    path, skipped = latest_checkpoint(name)
    if torn or path is None or skipped:
        return Outcome(case, False, f"torn: {torn}, skipped: {skipped}, taken: {path}")
    content = read_sealed(path)
    if weights is not None:
        same = all(torch.equal(content["state_dict"][key], value) for key, value in weights.items())
        good = same and acknowledged <= content["global_step"] <= acknowledged + 1
        parts = len(list(Path("outputs").rglob("*.part")))
        said = f"step {content['global_step']} after {acknowledged}, {parts} parts"
        return Outcome(case, good and parts <= 2, said)
    return Outcome(case, "optimizer_states" in content)


def flips(folder: Path) -> Iterator[Outcome]:
    data, readers = _read_by(folder)
    rng = random.Random(5)
    for number in range(FLIPS):
        # Half of them at the end, where the digest and the directory of the archive lie.
        place = rng.randrange(len(data)) if number % 2 else len(data) - 1 - rng.randrange(2000)
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(8)
        yield _refused(f"bit of byte {place} of {len(data)}", bytes(changed), readers[number % len(readers)], folder)


def cuts(folder: Path) -> Iterator[Outcome]:
    data, readers = _read_by(folder)
    rng = random.Random(6)
    for number in range(CUTS):
        size = rng.randrange(len(data)) if number % 2 else len(data) - 1 - rng.randrange(200)
        yield _refused(f"cut after byte {size} of {len(data)}", data[:size], readers[number % len(readers)], folder)


def _read_by(folder: Path) -> tuple[bytes, list[Callable[[Path], object]]]:
    """A checkpoint, and all that reads one."""
    data = trained(folder / "run").read_bytes()
    config = compose_experiment("shapes_dyn", TINY)
    readers: list[Callable[[Path], object]] = [
        read_checkpoint,
        lambda path: resume_path(compose_experiment("shapes_dyn", [f"ckpt_path={path}"])),
        lambda path: start_from(torch.nn.Identity(), path, config),
        lambda path: CheckpointFiles().load_checkpoint(path, weights_only=False),
    ]
    for reader in readers[::3]:
        reader(folder / "run" / "checkpoints" / "last.ckpt")  # whole, they take it
    return data, readers


def _refused(case: str, data: bytes, reader: Callable[[Path], object], folder: Path) -> Outcome:
    file = folder / "damaged.ckpt"
    file.write_bytes(data)
    try:
        reader(file)
    except UserError as error:
        line = str(error)
        return Outcome(case, "damaged" in line and str(file) in line and "\n" not in line, line)
    return Outcome(case, False, "it was read")


def fallbacks(folder: Path) -> Iterator[Outcome]:
    """Every subset of two runs' files is damaged, by a bit or a cut; what is left decides."""
    names = ("last", "previous", "best")
    steps = {("new", "last"): 30, ("new", "previous"): 20, ("new", "best"): 10}
    steps |= {("old", name): step - 9 for (_, name), step in steps.items()}
    with contextlib.chdir(folder):
        for kind, lost in itertools.product(("a bit", "a cut", "gone"), _subsets(steps)):
            shutil.rmtree("outputs", ignore_errors=True)
            for number, run in enumerate(("old", "new")):
                for name in names:
                    file = Path("outputs", "x", run, "checkpoints", f"{name}.ckpt")
                    write_sealed({"global_step": steps[run, name], "w": torch.ones(100)}, file)
                    moment = number * 1000 + steps[run, name]
                    os.utime(file, (moment, moment))
                    if (run, name) in lost:
                        _damage(file, kind)
            left = [key for key in steps if key not in lost]
            newest = [key for key in left if key[0] == "new"] or left
            best = max(newest, key=lambda key: steps[key]) if left else None
            path, skipped = latest_checkpoint("x")
            found = (path.parent.parent.name, path.stem) if path else None
            said = all(file.stem in names and why for file, why in skipped)
            yield Outcome(f"{kind}: {sorted(lost)}", found == best and said, f"{found} instead of {best}")


def _subsets(keys: Any) -> list[frozenset[Any]]:
    sizes = (0, 1, 2, 3, 6)
    return [frozenset(some) for size in sizes for some in itertools.combinations(keys, size)]


def _damage(file: Path, kind: str) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    if kind == "gone":
        file.unlink()
    else:
        state = file.stat()
        file.write_bytes(data if kind == "a bit" else data[: len(data) // 3])
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


def earlier(folder: Path) -> Iterator[Outcome]:
    """Without a digest a file has the checksums of its parts: it is refused, or holds what it held."""
    content = {"state_dict": {f"w{i}": torch.randn(300) for i in range(20)}, "global_step": 7}
    file = folder / "earlier.ckpt"
    torch.save(content, file)
    data, whole, rng = file.read_bytes(), repr(read_sealed(file)), random.Random(7)
    for _ in range(CUTS):
        place = rng.randrange(len(data))
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        try:
            held = repr(read_sealed(file))
        except UserError:
            held = whole
        yield Outcome(f"bit of byte {place} of {len(data)}", held == whole, "other tensors were read")


def lessons(folder: Path) -> Iterator[Outcome]:
    lesson = Lesson(torch.randn(50, 32), torch.rand(2, 50))
    file, rng = LessonFile(folder, 3), random.Random(8)
    file.write(lesson)
    data = file.path.read_bytes()
    for number in range(2 * CUTS):
        place = rng.randrange(len(data))
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(8)
        file.path.write_bytes(changed if number % 2 else data[:place])
        read = file.read(50)
        same = read is None or (torch.equal(read.pooled, lesson.pooled) and torch.equal(read.losses, lesson.losses))
        yield Outcome(f"{'bit of' if number % 2 else 'cut at'} byte {place} of {len(data)}", same, "read as it is")


_HELD = "the newest checkpoint that is whole is found, at the last step saved or the one on its way; none is torn"
ROWS = [
    Row("R3.1", "SIGKILL while a checkpoint is saved", _HELD, partial(kills, None), 60),
    Row(
        "R3.2",
        "SIGKILL while a checkpoint is saved, outputs on another file system than TMPDIR",
        _HELD,
        partial(kills, "/dev/shm" if Path("/dev/shm").is_dir() else None),
        60,
    ),
    Row("R3.3", "SIGKILL at every call to the disk of a save", _HELD, moments, 5),
    Row("R5.1", "one flipped bit in a checkpoint", "refused in one line with the file's name", flips, 30),
    Row("R5.2", "a checkpoint that is cut off", "refused in one line with the file's name", cuts, 15),
    Row("R5.3", "ckpt_path=last where files are damaged", "the newest good one is taken, others named", fallbacks, 5),
    Row("R5.4", "one flipped bit in a file without a digest", "refused, or the same tensors", earlier, 5),
    Row("R5.5", "lessons of step 2, a bit flipped or cut off", "computed again, or the same tensors", lessons, 5),
]
