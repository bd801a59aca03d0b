"""R2.8: commands other than training that are interrupted at random times."""

from __future__ import annotations

import json
import os
import random
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import torch
from PIL import Image

import dyndet.calibrate
import dyndet.doctor
import dyndet.evaluate
import dyndet.predict
import dyndet.report.__main__
import dyndet.train  # noqa: F401  what is forked has them
from dyndet.checkpoints.read import read_checkpoint
from dyndet.errors import UserError
from dyndet.signals import CODES
from faults import runs
from faults.row import Outcome, Row

TIMES = 8


def interrupted_commands(folder: Path) -> Iterator[Outcome]:
    runs.run("fine-grained", folder / "run", "trainer.max_epochs=1", "data.val_images=40")
    runs.run("cascade", folder / "step1", "trainer.max_epochs=1")
    (folder / "photos").mkdir()
    for number in range(20):
        Image.effect_noise((96, 64), 60).convert("RGB").save(folder / "photos" / f"{number}.png")
    experiment, keys = runs.FAMILIES["router"]
    ckpt = f"ckpt={folder}/run/checkpoints/last.ckpt"
    commands = {
        "evaluate": [ckpt, "trainer.accelerator=cpu"],
        "predict": [ckpt, f"source={folder}/photos", "out=out", "device=cpu", "formats=[json,coco,csv,yolo]"],
        "calibrate": [f"ckpt={folder}/calibrated.ckpt", "device=cpu", "latency_images=2"],
        "report": [f"runs={folder}/run"],
        "train": [
            f"+experiment={experiment}",
            *keys,
            f"init={folder}/step1/checkpoints/last.ckpt",
            "router.cache=lessons",
        ],
    }
    chance = random.Random(2)
    for command, arguments in commands.items():
        shutil.copy(folder / "run" / "checkpoints" / "last.ckpt", folder / "calibrated.ckpt")
        started = time.monotonic()
        code = _forked(command, arguments, folder / command / "whole")
        seconds = time.monotonic() - started
        yield Outcome(f"{command}, undisturbed", code == 0, _said(folder / command / "whole"))
        for number in range(TIMES):
            here, name = folder / command / str(number), ("SIGTERM", "SIGINT")[number % 2]
            after = chance.uniform(0, seconds)
            code = _forked(command, arguments, here, after, name)
            found = [] if code in (CODES[name], 0) else [f"exit {code}"]
            found += ["a traceback"] if "Traceback" in _said(here) else []
            found += [*_halves(here), *_halves(folder / "run"), *_damaged(folder / "calibrated.ckpt")]
            text = _said(here)
            said = f"{', '.join(found)}: {text[max(text.find('Traceback'), 0) :][-1500:]}"
            yield Outcome(f"{command}: {name} after {after / seconds:.0%} of it", not found, said)


def _forked(command: str, arguments: list[str], folder: Path, after: float = 0, name: str = "SIGTERM") -> int | str:
    folder.mkdir(parents=True)
    process = get_context("fork").Process(target=_run, args=(command, arguments, folder))
    process.start()
    if after:
        process.join(after)
        if process.exitcode is None:
            os.kill(int(process.pid or 0), getattr(signal, name))
    process.join(120)
    code = "hangs" if process.exitcode is None else process.exitcode
    process.kill()
    process.join()
    number = getattr(signal, name)
    return CODES[name] if code == -number else code  # before its first line: what shells say of it


def _run(command: str, arguments: list[str], folder: Path) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [f"dyndet.{command}", *arguments]
    with Path("said").open("w", buffering=1) as said:
        sys.stdout = sys.stderr = said
        runpy.run_module(f"dyndet.{command}", run_name="__main__", alter_sys=True)


def _said(folder: Path) -> str:
    return (folder / "said").read_text()


def _halves(folder: Path) -> list[str]:
    """Files that are not whole."""
    found = []
    for path in folder.rglob("*.json"):
        try:
            json.loads(path.read_text())
        except ValueError:
            found.append(f"half of {path.name}")
    return found


def _damaged(path: Path) -> list[str]:
    try:
        read_checkpoint(path)
    except UserError as error:
        return [str(error)]
    return []


ROWS = [
    Row(
        "R2.8",
        f"evaluate, predict, calibrate, report, step 2 from its first pass on: SIGTERM or SIGINT, {TIMES} times each",
        "exit 143 or 130 (0 if it was done), no traceback, no half of a file",
        interrupted_commands,
        150,
    )
]
