"""Kernels compile for GPUs that are not there, without spills and with the instructions they are fast through."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "compile_kernels.py"


def compile_kernels(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    return result.stdout


def test_quick_subset() -> None:
    assert "gather_gemm" in compile_kernels("--quick", "--sm", "90")


@pytest.mark.slow
def test_everything() -> None:
    assert " 0 faults" in compile_kernels("--sm", "80", "90")
