"""Whether the oldest versions that pyproject.toml allows really work: installs them and runs the quick tests.

    python scripts/check_floors.py                       into a folder that is removed afterwards
    python scripts/check_floors.py --venv FOLDER         into this one, which stays
    python scripts/check_floors.py -- -k checkpoint      what follows -- is for pytest

Needs uv (`make setup` installs it) and an index of packages, as installing does.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "tensorboard", "build", "zensical"]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path)
    parser.add_argument("tests", nargs="*", help="arguments of pytest, after --")
    options = parser.parse_args(arguments)
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    with tempfile.TemporaryDirectory() as temporary:
        venv = options.venv or Path(temporary) / "venv"
        python = venv / "bin" / "python"
        install = [uv, "pip", "install", "--quiet", "--python", str(python)]
        steps = [
            [uv, "venv", "--quiet", "--allow-existing", "--python", sys.executable, str(venv)],
            [*install, "--resolution", "lowest-direct", "--editable", f"{ROOT}[video]"],
            [*install, *TOOLS],
        ]
        for step in steps:
            if (code := subprocess.run(step, cwd=ROOT, check=False).returncode) != 0:
                return code
        subprocess.run([uv, "pip", "freeze", "--quiet", "--python", str(python)], check=False)
        tests = [str(python), "-m", "pytest", "-m", "not slow", "-n", "2", *options.tests]
        return subprocess.run(tests, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
