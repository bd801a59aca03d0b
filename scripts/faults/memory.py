"""R10: memory that runs out, in training, validation and the commands that use a detector."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dyndet.calibrate import calibrate
from dyndet.cli.compose import compose_command
from dyndet.errors import MemoryShortageError
from dyndet.evaluate import evaluate
from dyndet.models.detectors.pyramid import PyramidDetector
from dyndet.predict import predict
from faults import runs
from faults.row import Outcome, Row

PLACES = [
    ("on_before_backward", 6), ("on_validation_batch_start", 3), ("on_after_backward", 5),
    ("on_before_optimizer_step", 6), ("on_before_zero_grad", 1), ("on_validation_batch_end", 2),
]  # fmt: skip


def _of_device() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB")


def _of_host() -> None:
    raise MemoryError


def _of_torch() -> None:
    torch.empty(1 << 58)  # really


ERRORS = [_of_device, _of_torch, _of_host]
FAMILIES = [
    "fine-grained",
    "fine-grained, accumulated",
    "yolo with mosaics",
    "fine-grained, averaged",
    "router",
    "cascade",
]


def stopped(folder: Path) -> Iterator[Outcome]:
    for number in range(18):
        (hook, call), error, family = PLACES[number % 6], ERRORS[number // 6], FAMILIES[(number + number // 6) % 6]
        root, where = folder / f"of{FAMILIES.index(family)}", folder / str(number)
        case = f"{family}: {error.__name__[4:]} memory at {hook} {call}, stop"
        text, found = _run(family, root, where, hook, call, error), []
        wanted = ["out of memory in ", "batch_size", "validation" if "validation" in hook else "training, step"]
        found += [f"not said: {word}" for word in wanted if word not in text]
        found += ["more than a line"] if "\n" in text else []
        last = where / "checkpoints" / "last.ckpt"
        again = [f"ckpt_path={last}"] if last.is_file() else []
        found += ["last.ckpt is not named"] if again and "last.ckpt" not in text else []
        runs.run(family, where, *runs.start(family, root), *again)
        found += runs.differences(runs.whole(family, root), where)
        yield Outcome(case, not found, ", ".join(found[:4]))


def halved(folder: Path) -> Iterator[Outcome]:
    for number, (hook, call) in enumerate(PLACES * 2):
        family, often = [name for name in FAMILIES if name != "router"][number % 5], 1 + number // 6
        root, where = folder / f"of{FAMILIES.index(family)}", folder / str(number)
        case = f"{family}: memory at {hook} {call}, {often} times, halve"
        text, found = _run(family, root, where, hook, call, _of_device, "on_oom=halve", often=often), []
        in_validation = "validation" in hook
        if in_validation and often > 1:  # batches of 2 cannot be halved twice
            found += [] if "out of memory in validation" in text else ["not said"]
            yield Outcome(case, not found, ", ".join(found))
            continue
        found += [text] if text else []
        now, before = runs.content(where), runs.content(runs.whole(family, root))
        config, then = (content["dyndet"]["config"] for content in (now, before))
        window = then["trainer"]["accumulate_grad_batches"] * (1 if in_validation else 2**often)
        size = 4 if in_validation else 4 // 2**often
        if (config["data"]["batch_size"], config["trainer"]["accumulate_grad_batches"]) != (size, window):
            found.append(f"batches of {config['data']['batch_size']}")
        if in_validation and config["data"]["val_batch_size"] != 1:
            found.append("the batch of validation was not halved")
        if now["global_step"] != before["global_step"] or now["epoch"] != before["epoch"]:
            found.append(f"{now['global_step']} steps instead of {before['global_step']}")
        if now["lr_schedulers"][0]["last_epoch"] != before["lr_schedulers"][0]["last_epoch"]:
            found.append("another schedule")
        yield Outcome(case, not found, ", ".join(found[:4]))


def _run(
    family: str, root: Path, where: Path, hook: str, call: int, error: Callable[[], None], *keys: str, often: int = 1
) -> str:
    """What a run says that ends by it; empty if it does not end."""
    times: list[int] = []

    def once() -> None:
        times.append(1)
        if len(times) <= often:
            error()

    runs.Disturb.actions.append(once)
    try:
        runs.run(family, where, *runs.start(family, root), runs.disturbed(hook, call), *keys)
    except MemoryShortageError as shortage:
        return str(shortage)
    return ""


def used(folder: Path) -> Iterator[Outcome]:
    """The commands that use a detector."""
    last = runs.whole("fine-grained", folder) / "checkpoints" / "last.ckpt"
    Image.new("RGB", (90, 70)).save(folder / "photo.png")
    commands: dict[str, tuple[Callable[[Any], Any], list[str], str]] = {
        "evaluate": (evaluate, ["trainer.accelerator=cpu"], "data.batch_size=1"),
        "predict": (predict, [f"source={folder}/photo.png", "device=cpu", f"out={folder}/found"], "photo.png"),
        "calibrate": (calibrate, ["device=cpu", "data.batch_size=2"], "data.batch_size=1"),
    }
    whole = PyramidDetector.detect_with_routing
    for name, (command, keys, advice) in commands.items():
        for error in ERRORS:
            PyramidDetector.detect_with_routing = lambda *_, error=error: error()  # type: ignore[method-assign,assignment]
            config = compose_command(name, [f"ckpt={last}", f"output_dir={folder}/{name}", *keys])
            said = "no error"
            try:
                with runs.quiet():
                    command(config)
            except MemoryShortageError as shortage:
                said = str(shortage)
            finally:
                PyramidDetector.detect_with_routing = whole  # type: ignore[method-assign]
            good = "out of memory in" in said and " (H x W)" in said and advice in said and "\n" not in said
            yield Outcome(f"{name}: {error.__name__[4:]} memory", good, "" if good else said)


ROWS = [
    Row(
        "R10.1", "memory of the device or the host runs out in steps and validations; on_oom=stop",
        "one line with sizes, step and what to set; the resumed run ends as the undisturbed one", stopped, 80,
    ),
    Row(
        "R10.2", "the same; on_oom=halve",
        "the run goes on with half the batch and twice the window, to the same step, epoch and place in its schedule",
        halved, 60,
    ),
    Row(
        "R10.3", "memory runs out in evaluate, predict and calibrate",
        "one line with the sizes of the images and what to set", used, 10,
    ),
]  # fmt: skip
