"""Commands as a user types them, in a process of their own or, much sooner, in a copy of this one."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path

import dyndet.convert.__main__
import dyndet.doctor
import dyndet.evaluate
import dyndet.predict
import dyndet.report.__main__
import dyndet.train  # noqa: F401  what is forked has them

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true", "CUDA_VISIBLE_DEVICES": ""}


def command(folder: Path, name: str, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", f"dyndet.{name}", *arguments]
    return subprocess.run(
        line, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, check=False
    )


def forked(folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As `command`, by a copy of this process, which has imported everything already."""

    def run() -> None:
        with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
            os.chdir(folder)
            os.environ.update(ENVIRONMENT)
            sys.argv = [f"dyndet.{name}", *arguments]
            warnings.filterwarnings("ignore", message=".*found in sys.modules")
            with redirect_stdout(out), redirect_stderr(err):
                runpy.run_module(f"dyndet.{name}", run_name="__main__", alter_sys=True)

    process = get_context("fork").Process(target=run)
    process.start()
    process.join(timeout=240)
    process.kill()  # if it hangs
    process.join()
    outputs = ((folder / stream).read_text() for stream in ("stdout", "stderr"))
    return subprocess.CompletedProcess(sys.argv, int(process.exitcode or 0), *outputs)
