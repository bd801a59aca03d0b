"""R6.6: commands on a set with an unreadable image."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from faults.image_files import KINDS, coco_set
from faults.row import Outcome, Row

_SMALL = [
    "+experiment=shapes_dyn", "data=coco", "data.size=[64,64]", "data.batch_size=3", "trainer.accelerator=cpu",
    "trainer.max_epochs=1", "neck.channels=16", "head.norm_groups=4", "head.depth=1", "~callbacks.progress",
]  # fmt: skip


def _set(folder: Path, bad: bool) -> list[str]:
    """Keys of a set of six images, the fifth of which is cut off."""
    rng = random.Random(0)
    files = [KINDS["alpha"][1](rng) for _ in range(6)]
    if bad:
        files[4] = KINDS["truncated"][1](rng)
    file = coco_set(folder, files)
    images = folder / "images"
    names = {"train_annotations": file, "val_annotations": file, "train_images": images, "val_images": images}
    return [f"data.root={folder}", *(f"data.{key}={path}" for key, path in names.items())]


def _command(folder: Path, *line: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", "dyndet", *line],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def _inject(folder: Path) -> Iterator[Outcome]:
    good, bad = _set(folder / "good", bad=False), _set(folder / "bad", bad=True)
    first = _command(folder, "train", *_SMALL, *good, "data.num_workers=0", f"hydra.run.dir={folder}/run")
    if first.returncode:
        yield Outcome("a sound set", False, first.stderr)
        return
    root = next(item for item in bad if item.startswith("data.root"))
    others = [root, *(item for item in bad if item.startswith("data.val"))]
    checkpoint = f"ckpt={folder}/run/checkpoints/last.ckpt"
    evaluate = ["evaluate", checkpoint, *others, "trainer.accelerator=cpu", "data.batch_size=3"]
    lines = {
        "train": ["train", *_SMALL, *bad],
        "evaluate": evaluate,
        "calibrate": ["calibrate", checkpoint, *others, "device=cpu", f"out={folder}/c.ckpt"],
        "doctor": ["doctor", *_SMALL, *bad, "sheet=false"],
    }
    for workers, (name, line) in product((2, 0), lines.items()):
        run = _command(folder, *line, f"data.num_workers={workers}")
        told = [text for text in run.stderr.splitlines() if text.startswith("error:")]
        text = run.stdout + run.stderr
        fine = run.returncode == 2 and len(told) == 1 and "5.jpg" in told[0] and "data.on_error=skip" in told[0]
        if name == "doctor":  # whose business it is to find it
            fine = run.returncode == 1 and not told and "5.jpg" in text
        times = text.count("cannot be decoded")
        fine = fine and "Traceback" not in text and times == (2 if name == "doctor" else 1)  # it lies in both splits
        yield Outcome(f"{name}, {workers} workers", fine, f"{run.returncode}, told {times} times: {text[-300:]}")
    for workers, name in product((2, 0), ("train", "evaluate", "calibrate")):
        run = _command(folder, *lines[name], f"data.num_workers={workers}", "data.on_error=skip")
        fine = run.returncode == 0 and "1 file left out" in run.stdout and "quarantine.csv" in run.stdout
        yield Outcome(f"{name}, {workers} workers, skip", fine, f"{run.returncode}: {(run.stdout + run.stderr)[-300:]}")


ROWS = [
    Row(
        "R6.6",
        "commands on a set with an unreadable image, with 0 and 2 workers, by both policies",
        "raise: one line with the file and the way out, exit code 2 (doctor: a finding); skip: done and told in a line",
        _inject,
        150,
    )
]
