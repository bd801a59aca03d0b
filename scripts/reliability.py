"""`make reliability`: injects faults, counts what survives, and writes docs/reliability.md.

    python scripts/reliability.py                 all rows, two at a time
    python scripts/reliability.py R2 R5.1         these rows; the others stay as they were measured
    python scripts/reliability.py --list          what there is

What was measured lies in outputs/reliability, one file a row. Exits with 1 if a case of any row did not survive.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import faults
from faults.row import Outcome, Row

NOT_HERE = [
    "Not in the table, since they were not measured: CUDA devices, where the order of atomic additions is not fixed "
    "(`trainer.deterministic=true` makes torch refuse such operations); clusters of several machines; what public "
    "databases know of the pinned versions (`make audit` asks them, and checks licences); the oldest versions that "
    "are allowed (`make floors` installs and tests them); exported models, as there is no export yet.",
]
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
KEPT = ROOT / "outputs" / "reliability"


def rows() -> list[Row]:
    """All, in the order of the page."""
    modules = [import_module(f"faults.{found.name}") for found in iter_modules(faults.__path__)]
    found = [row for module in modules for row in getattr(module, "ROWS", ())]
    return sorted(found, key=lambda row: _number(row.id))


def _number(row: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", row)]


def measure(row: Row) -> dict[str, Any]:
    """Injects all of a row's faults."""
    started, outcomes = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix=f"dyndet_{row.id}_") as folder:
        try:
            for outcome in row.inject(Path(folder)):
                outcomes.append(outcome)
                if not outcome.survived:
                    print(f"{row.id} FAILED {outcome.case}: {outcome.said}", flush=True)
                if len(outcomes) % 10 == 0:
                    print(f"{row.id} {len(outcomes)} injected", flush=True)
        except Exception as error:  # a row that breaks is a row that failed
            traceback.print_exc()
            outcomes.append(Outcome("the check itself", False, f"{type(error).__name__}: {error}"))
    lost = [{"case": outcome.case, "said": outcome.said} for outcome in outcomes if not outcome.survived]
    return {
        "fault": row.fault,
        "promise": row.promise,
        "injected": len(outcomes),
        "survived": len(outcomes) - len(lost),
        "lost": lost,
        "seconds": round(time.monotonic() - started),
        "date": date.today().isoformat(),
    }


def page(results: dict[str, dict[str, Any]], machine: str) -> str:
    """docs/reliability.md."""
    injected, survived = (sum(result[key] for result in results.values()) for key in ("injected", "survived"))
    lines = [
        "# Reliability",
        "",
        "What happens to dyndet when something breaks, counted. Every row injects one kind of fault; a case survives "
        "when the promise in its row holds. `make reliability` measures all of it and writes this page; a single row "
        "is measured by the command beside it.",
        "",
        f"{survived} of {injected} injected faults survived. Measured on {machine}.",
        "",
        *NOT_HERE,
        "",
        "| | fault | promise | injected | survived | command |",
        "|---|---|---|---:|---:|---|",
    ]
    for name in sorted(results, key=_number):
        result = results[name]
        cells = (
            name, result["fault"], result["promise"], result["injected"], result["survived"],
            f"`python scripts/reliability.py {name}`",
        )  # fmt: skip
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    lost = [(name, item) for name in sorted(results, key=_number) for item in results[name]["lost"]]
    lines += ["", "## What did not survive", ""]
    lines += [f"* {name}, {item['case']}: {' '.join(item['said'].split())[:300]}" for name, item in lost] or [
        "Nothing."
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="R2 is R2.1, R2.2, ...; all when none is given")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--here", action="store_true", help="in this process, without writing the page")
    options = parser.parse_args(arguments)
    known = rows()
    for name in options.rows:
        if not any(_is(row, name) for row in known):
            parser.error(f"{name}: no such row; --list names them")
    chosen = [row for row in known if not options.rows or any(_is(row, name) for name in options.rows)]
    if options.list:
        for row in chosen:
            print(f"{row.id:6} about {row.seconds / 60:.1f} min  {row.fault}")
        return 0
    if options.here:
        results = [measure(row) for row in chosen]
        for row, result in zip(chosen, results, strict=True):
            KEPT.mkdir(parents=True, exist_ok=True)
            (KEPT / f"{row.id}.json").write_text(json.dumps(result, indent=1) + "\n")
        return int(any(result["lost"] for result in results))
    with ThreadPoolExecutor(options.jobs) as pool:
        longest = sorted(chosen, key=lambda row: -row.seconds)
        codes = list(pool.map(_in_a_process, longest))
    results = {row.id: _kept(row.id) for row in known if (KEPT / f"{row.id}.json").is_file()}
    PAGE.write_text(page(results, _machine()))
    for name, result in results.items():
        print(
            f"{name:6} {result['survived']:>5} of {result['injected']:<5} {result['seconds']:>5} s  {result['fault']}"
        )
    print(f"page: {PAGE}")
    return int(any(codes))


def _is(row: Row, name: str) -> bool:
    return row.id == name or row.id.startswith(f"{name}.")


def _in_a_process(row: Row) -> int:
    line = [sys.executable, __file__, "--here", row.id]
    return subprocess.run(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode


def _kept(name: str) -> dict[str, Any]:
    return json.loads((KEPT / f"{name}.json").read_text())


def _machine() -> str:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kind = f"{platform.machine()}, {platform.system()}"
    return f"{cores} cores ({kind}), Python {platform.python_version()}, torch {torch.__version__}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
