"""Tiny runs of every family, in this process, that are disturbed at a chosen moment and then go on."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from dyndet.cli.compose import compose_experiment
from dyndet.train import train

_SMALL = [
    "data.size=64", "data.train_images=16", "data.val_images=4", "data.batch_size=4", "data.val_batch_size=2",
    "trainer.accelerator=cpu", "trainer.max_epochs=3", "~callbacks.progress",
    "~callbacks.preview", "~callbacks.density", "~callbacks.learning_rate", "logger=[]", "trainer.log_every_n_steps=1",
]  # fmt: skip
_HEAD = ["neck.channels=16", "head.depth=1", "head.norm_groups=4"]
_TOWER = ["neck.channels=16", "head.num_convs=1", "head.norm_groups=4"]

FAMILIES: dict[str, tuple[str, list[str]]] = {
    "fine-grained": ("shapes_dyn", [*_SMALL, *_HEAD]),
    "fine-grained, averaged": ("shapes_dyn", [*_SMALL, *_HEAD, "+callbacks.ema={_target_: dyndet.lightning.ema.EMA}"]),
    "fine-grained, accumulated": ("shapes_dyn", [*_SMALL, *_HEAD, "trainer.accumulate_grad_batches=3"]),
    "dyhead": ("shapes_dyn", [*_SMALL, "neck.channels=16", "head=dyhead", "head.num_blocks=1"]),
    "cascade": ("shapes_dy_tiny", [*_SMALL, *_TOWER]),
    "router": ("shapes_dy_tiny", [*_SMALL, *_TOWER, "+router=exact", "router.batch_size=4", "trainer.max_epochs=3"]),
    "yolo with mosaics": ("shapes_dy_yolo", _SMALL),
}
"""What is trained: an experiment and its keys. Twelve batches in three epochs, a validation after each."""


def run(family: str, folder: Path, *keys: str) -> dict[str, float]:
    """One run, silent."""
    experiment, own = FAMILIES[family]
    with quiet():
        return train(compose_experiment(experiment, [*own, f"output_dir={folder}", *keys]))


@contextmanager
def quiet() -> Iterator[StringIO]:
    """Nothing is printed; what would have been is in the text."""
    said = StringIO()
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), redirect_stdout(said), redirect_stderr(said):
        warnings.simplefilter("ignore")
        try:
            yield said
        finally:
            logging.disable(before)


def content(folder: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def differences(one: Path, other: Path) -> list[str]:
    """What the ends of two runs differ in: weights, averages, moments, the best checkpoint, results."""
    found = []
    for name in ("last", "best"):
        a, b = content(one, name), content(other, name)
        for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
            if not _same(_values(a.get(part)), _values(b.get(part))):
                found.append(f"{part} of {name}.ckpt")  # noqa: PERF401
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    left_out = ("train/", "epoch")  # the last batch's losses; a validation that came after the run is of the next epoch
    kept = [{key: value for key, value in numbers.items() if not key.startswith(left_out)} for numbers in results]
    return found + [key for key in kept[0] if kept[0][key] != kept[1].get(key)]


def _values(part: Any) -> Any:
    """Without how often a schedule was asked."""
    if isinstance(part, list):
        return [_values(item) for item in part]
    counts = ("_step_count", "_get_lr_called_within_step")
    return {key: value for key, value in part.items() if key not in counts} if isinstance(part, dict) else part


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@cache
def whole(family: str, root: Path, *keys: str) -> Path:
    """The run that nothing disturbs."""
    folder = root / "whole"
    run(family, folder, *start(family, root), *keys)
    return folder


@cache
def start(family: str, root: Path) -> tuple[str, ...]:
    """Keys that a family needs beside its own: a router that of step 1."""
    if family != "router":
        return ()
    run("cascade", root / "step1", "trainer.max_epochs=1")
    return (f"init={root}/step1/checkpoints/last.ckpt", f"router.cache={root}/lessons")


class Disturb(Callback):
    """Does the last of `actions`, once, when a hook is called for the n-th time."""

    done: ClassVar[bool] = False
    actions: ClassVar[list[Callable[[], None]]] = []

    def __init__(self, hook: str, call: int) -> None:
        self.hook, self.call, self.calls = hook, call, 0
        type(self).done = False

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_") and name == object.__getattribute__(self, "hook"):
            return self._called
        return object.__getattribute__(self, name)

    def _called(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self.calls += 1
        if self.calls == self.call:
            type(self).done = True
            self.actions[-1]()


def disturbed(hook: str, call: int) -> str:
    return f"+callbacks.disturb={{_target_: {__name__}.Disturb, hook: {hook}, call: {call}}}"


def send(number: int) -> Callable[[], None]:
    """Sends a signal to this process."""
    return lambda: os.kill(os.getpid(), number)


def send_after(seconds: float, number: int = signal.SIGTERM) -> threading.Timer:
    timer = threading.Timer(seconds, send(number))
    timer.daemon = True
    timer.start()
    return timer
