"""R12, R20: the same seed gives the same weights, and a long run holds no more than a short one."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from faults import runs
from faults.row import Outcome, Row

STEPS, VALIDATIONS = 2000, 20


def same_seed(folder: Path) -> Iterator[Outcome]:
    for number, family in enumerate(runs.FAMILIES):
        own = folder / str(number)
        given = runs.start(family, own)
        here = {name: own / name.replace(" ", "_") for name in ("one", "again", "two workers")}
        for name, place in here.items():
            runs.run(family, place, *given, f"data.num_workers={2 if 'workers' in name else 0}")
        for name in ("again", "two workers"):
            found = runs.differences(here["one"], here[name])
            yield Outcome(f"{family}: {name}", not found, ", ".join(found[:4]))
        runs.run(family, own / "other", *given, "seed=1")
        differs = bool(runs.differences(here["one"], own / "other"))
        yield Outcome(f"{family}: another seed differs", differs, "another seed gives the same")


_LONG = """
    import json, os, sys
    import torch
    from lightning.pytorch import Callback
    from faults import runs

    torch.set_num_threads(1)
    page = os.sysconf("SC_PAGE_SIZE")

    class Watch(Callback):
        seen = []
        def on_validation_end(self, trainer, module):
            if not trainer.sanity_checking:
                resident = int(open("/proc/self/statm").read().split()[1]) * page
                Watch.seen.append((trainer.global_step, resident, len(os.listdir("/proc/self/fd"))))

    sys.modules["watch"] = sys.modules["__main__"]
    runs.run("fine-grained", sys.argv[1], "+callbacks.watch={_target_: watch.Watch}", "data.train_images=100",
             "data.size=64", "data.batch_size=1", "trainer.max_epochs=20", "trainer.gradient_clip_val=10")
    print(json.dumps(Watch.seen))
"""


def long_run(folder: Path) -> Iterator[Outcome]:
    """Memory and open files at each validation; the first quarter of the run is its start."""
    line = [sys.executable, "-c", textwrap.dedent(_LONG), str(folder)]
    result = subprocess.run(line, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    seen = json.loads(result.stdout.splitlines()[-1]) if result.returncode == 0 else []
    right = len(seen) == VALIDATIONS and seen[-1][0] == STEPS
    yield Outcome(f"{STEPS} steps, {VALIDATIONS} validations", right, f"{seen} {result.stderr[-300:]}")
    if not right:
        return
    settled = seen[VALIDATIONS // 4 :]
    growth = settled[-1][1] / settled[0][1] - 1
    yield Outcome(f"memory grows by {growth:.1%}, less than 2 %", growth < 0.02, str(seen))
    files = {count for *_, count in settled}
    yield Outcome(f"{max(files)} open files, always", len(files) == 1, str(seen))


ROWS = [
    Row(
        "R12.1",
        "each family again, with two loader processes, and with another seed",
        "weights, averages, moments, results are equal to the last bit; with another seed they are not",
        same_seed,
        90,
    ),
    Row("R20.1", f"a run of {STEPS} steps and {VALIDATIONS} validations", "no growth", long_run, 150),
]
