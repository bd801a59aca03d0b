"""R19: sweeps in which one job fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from faults.row import Outcome, Row

TINY = [
    "+experiment=shapes_dyn", "data.size=64", "data.train_images=8", "data.val_images=4", "data.batch_size=4",
    "trainer.accelerator=cpu", "trainer.max_epochs=1", "trainer.log_every_n_steps=1", "neck.channels=16",
    "head.depth=1", "head.norm_groups=4", "~callbacks.progress", "~callbacks.preview", "trainer.gradient_clip_val=null",
]  # fmt: skip
CASES = {
    "a value that cannot be": ("data.batch_size", "4,1000,2"),
    "a job that diverges": ("optim.optimizer.lr", "0.001,1e30,0.002"),
    "a checkpoint that is missing": ("init", "null,nowhere.ckpt"),
    "an option that is unknown": ("head.depth", "1,many"),
}


def sweep(folder: Path, *keys: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "dyndet.train", "-m", *TINY, *keys]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600)


def failing_jobs(folder: Path) -> Iterator[Outcome]:
    for number, (case, (key, values)) in enumerate(CASES.items()):
        here = folder / str(number)
        here.mkdir()
        jobs = values.split(",")
        first, again = (sweep(here, f"{key}={values}", *more) for more in ([], ["again=false"]))
        sweeps = sorted(here.glob("multirun/*/*"))
        found = [] if first.returncode == again.returncode == 1 else [f"exit {first.returncode}, {again.returncode}"]
        for index in range(len(jobs)):
            status = [json.loads((each / str(index) / "job.json").read_text())["status"] for each in sweeps]
            wanted = ["failed", "failed"] if index == 1 else ["done", "skipped"]
            found += [] if status == wanted else [f"job {index}: {status}"]
        found += [] if "Traceback" not in first.stderr else ["a traceback"]
        yield Outcome(case, not found, f"{', '.join(found)} {first.stderr[-200:]}")


ROWS = [
    Row(
        "R19.1",
        "a sweep whose second job cannot run, diverges, or names what is not there",
        "the others are done, a table says which failed, exit 1; again, only the failed one runs",
        failing_jobs,
        140,
    )
]
