"""R9, R17, R23, R24: rows that are tests, run with more examples or for their number."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from faults.row import Outcome, Row

ROOT = Path(__file__).parents[2]


def tests(folder: Path, chosen: Sequence[str], examples: int = 0) -> Iterator[Outcome]:
    """An outcome per test.

    Args:
        folder: for the results.
        chosen: arguments of pytest.
        examples: at least so many of each property; 0 as the tests say.
    """
    file = folder / "results.xml"
    line = [sys.executable, "-m", "pytest", "-n0", "-q", f"--junit-xml={file}", *chosen]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DYNDET_EXAMPLES": str(examples)}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if not file.is_file():
        yield Outcome("pytest", False, done.stdout[-300:])
        return
    for case in ElementTree.parse(file).iter("testcase"):
        if case.find("skipped") is None:
            bad = case.find("failure") if case.find("failure") is not None else case.find("error")
            said = "" if bad is None else str(bad.get("message"))[:200]
            yield Outcome(f"{case.get('classname')}::{case.get('name')}", bad is None, said)


ROWS = [
    Row(
        "R9.9",
        "properties of boxes, masks, assigners, samplers, transforms, rows: at least 500 random examples of each",
        "all hold",
        partial(tests, chosen=["-m", "hypothesis", "tests", "--ignore=tests/kernels"], examples=500),
        900,
    ),
    Row(
        "R23.1",
        "the wheel, installed outside the checkout, trains; every configuration composes",
        "exit 0",
        partial(tests, chosen=["tests/packaging", "tests/test_config.py", "tests/test_conf.py"]),
        120,
    ),
    Row(
        "R24.1",
        "Triton kernels in the interpreter: random masks of any density, shapes, strides, types; against dense runs",
        "equal within tolerance, no access out of bounds",
        partial(tests, chosen=["tests/kernels", "tests/ops/sparse"]),
        300,
    ),
]
