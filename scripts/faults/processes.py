"""R13: runs of several processes, over gloo on this machine."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from dyndet.cli.compose import compose_command
from dyndet.errors import LostProcessError, UserError
from dyndet.evaluate import evaluate
from dyndet.signals import listening
from faults import runs
from faults.row import Outcome, Row

FAMILY = "fine-grained, averaged"
DDP = ["trainer.devices=2", "trainer.strategy=ddp"]
LIMIT = 120
"""Seconds after which a process that still runs hangs."""


def together(tasks: list[Callable[[], object]], folder: Path, lost: int | None = None) -> list[int | str]:
    """Exit codes of processes that form one run; what the first says is in the folder, stdout0, and so on.

    One that is `lost` is not waited for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes: list[BaseProcess] = []
    for rank, task in enumerate(tasks):
        process = get_context("fork").Process(target=_rank, args=(rank, port, task, folder / f"stdout{rank}"))
        process.start()
        processes.append(process)
    deadline = time.monotonic() + LIMIT
    for rank, process in enumerate(processes):
        if rank != lost:
            process.join(max(deadline - time.monotonic(), 0.1))
    codes = ["hangs" if process.exitcode is None else process.exitcode for process in processes]
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(int(process.pid or 0), signal.SIGKILL)
        process.join()
    return codes


def _rank(rank: int, port: int, task: Callable[[], object], said: Path) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.pop("PL_GLOBAL_SEED", None)
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = said.open("w", buffering=1)
    try:
        with listening():
            task()
    except UserError as error:
        print(f"error: {error}", flush=True)
        os._exit(3 if isinstance(error, LostProcessError) else 2)


def run(folder: Path, *keys: str, ranks: int = 2, hurt: int = 0, lost: bool = False) -> list[int | str]:
    """A run of several processes; `runs.disturbed` is for the one that is hurt alone."""
    common = [key for key in keys if "disturb" not in key]
    devices = [f"trainer.devices={ranks}", "trainer.strategy=ddp"]

    def task(rank: int) -> Callable[[], object]:
        own = list(keys) if rank == hurt else common
        return lambda: runs.run(FAMILY, folder, *devices, *own)

    return together([task(rank) for rank in range(ranks)], folder, hurt if lost else None)


def ended_together(folder: Path) -> Iterator[Outcome]:
    """One process gets a signal; all end with its code, and the resumed run ends as the undisturbed one."""
    whole = folder / "whole"
    run(whole)
    moments = [
        ("on_before_backward", 2), ("on_validation_batch_start", 1), ("on_train_batch_end", 2),
        ("on_validation_batch_end", 2), ("on_before_optimizer_step", 3), ("on_train_batch_start", 3),
    ]  # fmt: skip
    for number, (hook, call) in enumerate(moments):
        for hurt in (0, 1):
            name = ("SIGTERM", "SIGINT")[number % 2]
            runs.Disturb.actions.append(runs.send(getattr(signal, name)))
            here = folder / f"{number}-{hurt}"
            codes = run(here, runs.disturbed(hook, call), hurt=hurt)
            wanted = 143 if name == "SIGTERM" else 130
            found = [] if codes == [wanted, wanted] else [f"exit {codes}"]
            again = run(here, f"ckpt_path={here}/checkpoints/last.ckpt")
            found += [] if again == [0, 0] else [f"resumed: exit {again}"]
            found += runs.differences(whole, here)
            yield Outcome(f"{name} to process {hurt} at {hook} {call}", not found, ", ".join(found))


def lost(folder: Path) -> Iterator[Outcome]:
    """One process is killed or stops; the other ends by itself, with one line."""
    moments = [
        ("SIGKILL", "on_before_backward"), ("SIGSTOP", "on_before_backward"), ("SIGKILL", "on_validation_batch_start"),
        ("SIGSTOP", "on_validation_batch_start"), ("SIGKILL", "on_train_batch_end"),
    ]  # fmt: skip
    for number, (name, hook) in enumerate(moments):
        for hurt in (0, 1):
            runs.Disturb.actions.append(runs.send(getattr(signal, name)))
            here = folder / f"{number}-{hurt}"
            codes = run(here, "rank_timeout=10", runs.disturbed(hook, 2), hurt=hurt, lost=True)
            said = (here / f"stdout{1 - hurt}").read_text()
            lines = [line for line in said.splitlines() if line.startswith("error:")]
            good = codes[1 - hurt] == 3 and len(lines) == 1 and "another process" in lines[0]
            yield Outcome(f"{name} to process {hurt} at {hook}", good, f"exit {codes}: {said[-200:]}")


def other_numbers(folder: Path) -> Iterator[Outcome]:
    """Uneven batches, more processes than images, resuming with other numbers of both."""
    start = folder / "start"
    run(start, "trainer.max_epochs=1")
    last = f"ckpt_path={start}/checkpoints/last.ckpt"
    cases = [
        ("15 images in batches of 4", 2, ["data.train_images=15", "data.val_images=3"]),
        ("3 processes, 2 images to validate", 3, ["data.val_images=2"]),
        ("3 processes, 1 image to validate", 3, ["data.val_images=1"]),
        ("2 processes go on as 3", 3, [last]),
        ("2 processes go on as 1", 1, [last]),
        ("2 processes go on with batches of 2", 2, [last, "data.batch_size=2"]),
        ("2 processes go on with batches of 8", 2, [last, "data.batch_size=8"]),
        ("2 processes go on with accumulated gradients", 2, [last, "trainer.accumulate_grad_batches=2"]),
    ]
    for number, (case, ranks, keys) in enumerate(cases):
        here = folder / str(number)
        codes = run(here, *keys, ranks=ranks)
        folders = [path.name for path in folder.iterdir() if path.name not in ("start", *map(str, range(len(cases))))]
        good = codes == [0] * ranks and (here / "result.json").is_file() and not folders
        text = "".join((here / f"stdout{rank}").read_text()[-300:] for rank in range(ranks))
        yield Outcome(case, good, f"exit {codes}: {text}")


def same_numbers(folder: Path) -> Iterator[Outcome]:
    """What two processes measure is what one measures."""
    runs.run("fine-grained", folder / "run", "trainer.max_epochs=1")
    for images in (1, 2, 3, 7, 8):
        given = [f"ckpt={folder}/run/checkpoints/last.ckpt", "trainer.accelerator=cpu", "data.batch_size=1",
                 f"+data.val_images={images}"]  # fmt: skip
        numbers = []
        for ranks in (1, 2):
            here = folder / f"{images}-{ranks}"
            keys = [*given, f"output_dir={here}", f"trainer.devices={ranks}", "trainer.strategy=auto"]
            if ranks > 1:
                keys[-1] = "trainer.strategy=ddp"

            def task(keys: list[str] = keys) -> object:
                with runs.quiet():
                    return evaluate(compose_command("evaluate", keys))

            codes = together([task] * ranks, here)
            file = here / "result.json"
            numbers.append((codes, file.read_text() if file.is_file() else ""))
        good = numbers[0][1] == numbers[1][1] != ""
        yield Outcome(f"{images} images, one by one", good, str(numbers)[:300])


ROWS = [
    Row(
        "R13.1",
        "two processes: a signal to either, in steps and validations",
        "both end with its code; resumed, they end as the undisturbed run",
        ended_together,
        150,
    ),
    Row("R13.2", "two processes: one is killed or stops", "the other ends within rank_timeout, in one line", lost, 120),
    Row(
        "R13.3",
        "uneven batches, more processes than images, another number of processes or batch size on resume",
        "the run ends as usual, in one folder",
        other_numbers,
        60,
    ),
    Row("R13.4", "evaluation by two processes", "the numbers are those of one process", same_numbers, 40),
]
