"""R1, R2: runs that are interrupted anywhere and go on must end as if nothing had happened."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from dyndet.signals import CODES, Interrupted, listening
from faults import runs
from faults.row import Outcome, Row

HOOKS = [
    "on_before_backward", "on_validation_batch_start", "on_before_optimizer_step", "on_train_batch_end",
    "on_after_backward", "on_validation_batch_end", "on_train_batch_start", "on_validation_end", "on_before_zero_grad",
    "on_validation_start", "on_sanity_check_start", "on_train_epoch_end", "on_save_checkpoint",
    "on_validation_epoch_end", "on_train_start",
]  # fmt: skip
SIGNALS = ["SIGTERM", "SIGINT", "SIGUSR1"]


def moments() -> Iterator[tuple[str, int, str]]:
    """Hook, how often it has been called, signal: 24 of them, in steps, validations and between."""
    calls = {
        "on_train_start": [1],
        "on_train_epoch_end": [1, 2],
        "on_validation_end": [1, 2],
        "on_validation_start": [2],
    }
    number = 0
    for round_ in range(3):
        for hook in HOOKS:
            possible = calls.get(hook, [2, 5, 4])
            if round_ < len(possible) and number < 26:
                yield hook, possible[round_], SIGNALS[number % 3]
                number += 1


def interrupted(family: str, folder: Path) -> Iterator[Outcome]:
    for number, (hook, call, name) in enumerate(moments()):
        workers = 2 if number % 8 == 7 else 0
        runs.Disturb.actions.append(runs.send(getattr(signal, name)))
        where = folder / str(number)
        case = f"{family}: {name} at {hook} {call}, {workers} workers"
        keys = (f"data.num_workers={workers}", f"trainer.num_sanity_val_steps={2 * ('sanity' in hook)}")
        outcome = _outcome(case, family, folder, where, name, runs.disturbed(hook, call), *keys)
        if not runs.Disturb.done:  # so often it is not called in this family
            case = f"{family}: {name} at {hook} 1, {workers} workers"
            outcome = _outcome(case, family, folder, where / "1", name, runs.disturbed(hook, 1), *keys)
        yield outcome


def terminated(family: str, folder: Path) -> Iterator[Outcome]:
    chance = random.Random(family)
    runs.whole(family, folder)
    started = time.monotonic()
    runs.run(family, folder / "timed", *runs.start(family, folder))
    seconds = time.monotonic() - started
    for number in range(20):
        name = SIGNALS[number % 2]
        after = chance.uniform(0, seconds)
        case = f"{family}: {name} after {after / seconds:.0%} of the run"
        yield _outcome(case, family, folder, folder / f"t{number}", name, after=after)


def _outcome(case: str, family: str, root: Path, where: Path, name: str, *keys: str, after: float = 0) -> Outcome:
    """Runs until the signal, which comes after so many seconds or is that of `keys`, goes on, and compares."""
    given = runs.start(family, root)
    code: object = "no interruption"
    with listening():
        try:
            timer = runs.send_after(after, getattr(signal, name)) if after else None
            runs.run(family, where, *given, *keys)
            if timer is not None:
                timer.cancel()
                timer.join()
        except Interrupted as error:
            code = error.code
    again = [key for key in keys if "disturb" not in key]
    last = where / "checkpoints" / "last.ckpt"
    if last.is_file():
        runs.run(family, where, *given, *again, f"ckpt_path={last}")
    elif code != "no interruption":
        runs.run(family, where, *given, *again)
    found = runs.differences(runs.whole(family, root), where)
    if code not in (CODES[name], "no interruption"):
        found.append(f"exit {code}")
    if code == "no interruption" and keys:
        found.append("the signal was lost")
    return Outcome(case, not found, ", ".join(found[:4]))


ROWS = [
    Row(
        f"R1.{number}",
        f"{family}: SIGTERM, SIGINT, SIGUSR1 in steps, accumulated gradients, validations and between",
        "exit 143 or 130; resumed, it ends with the weights, averages, moments and results of the undisturbed run",
        lambda folder, family=family: interrupted(family, folder),
        100,
    )
    for number, family in enumerate(runs.FAMILIES, start=1)
] + [
    Row(
        f"R2.{number}",
        f"{family}: SIGTERM and SIGINT at 20 random times",
        "the same",
        lambda folder, family=family: terminated(family, folder),
        80,
    )
    for number, family in enumerate(runs.FAMILIES, start=1)
]
