"""Kernels compile for GPUs that are not there, without spills and with the instructions they are fast through."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "compile_kernels.py"


def compile_kernels(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    return result.stdout


def test_a_part_of_every_kernel() -> None:
    """All of them: `make kernels`, which CI runs as well."""
    printed = compile_kernels("--quick", "--sm", "80", "90")
    assert "gather_gemm" in printed and " 0 faults" in printed
