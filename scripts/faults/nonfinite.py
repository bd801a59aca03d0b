"""R8: values that are no numbers, anywhere in a step: no update is made of them, none is saved, replay finds them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

import dyndet.inputs
from dyndet.cli.compose import compose_command
from dyndet.errors import DivergedError
from dyndet.lightning.divergence import DivergenceWatch
from dyndet.replay import replay
from dyndet.structures import Batch
from faults import runs
from faults.row import Outcome, Row

KINDS = ["input", "target", "weight", "gradient", "statistics"]
STEPS = [2, 1, 3]
PRECISIONS = ["32-true", "bf16-mixed"]
NAN, INF = float("nan"), float("inf")


class Poison(Callback):
    """Puts a value that is no number somewhere in a step, and notes all state before it.

    Attributes:
        before: hash of weights, buffers, moments and averages before the step.
        after: the same when the run failed, or after the step.
    """

    latest: ClassVar[Poison]

    def __init__(self, kind: str, step: int, value: float) -> None:
        self.kind, self.step, self.value = kind, step, value
        self.before = self.after = ""
        self.skipped = 0
        type(self).latest = self

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        first = batch_idx % trainer.accumulate_grad_batches == 0
        if trainer.global_step != self.step or not first:
            return
        if self.kind == "weight":
            weight = next(p for p in pl_module.parameters() if p.requires_grad)
            weight.data[(0,) * weight.ndim] = self.value
        self.before = state(trainer, pl_module)
        if isinstance(batch, Batch):
            if self.kind == "input":
                batch.images.pixels = batch.images.pixels.float() / 255
                batch.images.pixels[1, 0, 3, 3] = self.value
            if self.kind == "target":
                next(target for target in batch.targets if len(target.boxes)).boxes[0, 2] = self.value
        elif self.kind in ("input", "target"):
            batch[self.kind == "target"].view(-1)[0] = self.value

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self.step and self.kind == "gradient":
            next(p.grad for p in reversed([*pl_module.parameters()]) if p.grad is not None).view(-1)[0] = self.value

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self.step + 1 and not self.after:
            self.after = state(trainer, pl_module)
            if self.kind == "statistics":
                found = [buffer for name, buffer in pl_module.named_buffers() if name.endswith("running_var")]
                (found or [next(pl_module.parameters()).data])[0].view(-1)[0] = self.value

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.after = self.after or state(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        watches = [callback for callback in trainer.callbacks if isinstance(callback, DivergenceWatch)]  # type: ignore[attr-defined]
        self.skipped = watches[0].skipped


def state(trainer: Trainer, module: LightningModule) -> str:
    """Hash of everything that a step changes, averages apart: these follow weights that stay, too."""
    digest = hashlib.sha256()
    moments: list[Any] = [list(part.values()) for item in trainer.optimizers for part in item.state.values()]
    for value in [*module.state_dict().values(), *(value for part in moments for value in part)]:
        if isinstance(value, Tensor):
            digest.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def values_unread() -> Iterator[None]:
    """As on a GPU, where nothing waits to look at pixels and boxes before a step."""
    before = dyndet.inputs._readable
    dyndet.inputs._readable = lambda tensor: False
    try:
        yield
    finally:
        dyndet.inputs._readable = before


def poisoned(policy: str, folder: Path) -> Iterator[Outcome]:
    for round_, kind in enumerate(KINDS):
        for number, family in enumerate(runs.FAMILIES):
            precisions = PRECISIONS if policy == "stop" else [PRECISIONS[(number + round_) % 2]]
            for precision in precisions:
                where = folder / f"{kind}{number}{precision}"
                value = INF if (number + round_) % 3 == 2 else NAN
                step = STEPS[(number + round_) % 3]
                case = f"{family}: {kind} {value} at step {step}, {precision}, {policy}"
                yield _outcome(case, family, folder / f"start{number}", where, kind, step, value, precision, policy)


def _outcome(
    case: str, family: str, root: Path, where: Path, kind: str, step: int, value: float, precision: str, policy: str
) -> Outcome:
    keys = [
        f"+callbacks.poison={{_target_: {__name__}.Poison, kind: {kind}, step: {step}, value: {value}}}",
        f"on_nonfinite={policy}",
        f"trainer.precision={precision}",
        "max_skipped=2",
        "trainer.max_epochs=2",
    ]
    said, found = "", []
    with values_unread():
        try:
            runs.run(family, where, *runs.start(family, root), *keys)
        except DivergedError as error:
            said = str(error)
        ends = policy == "stop" or kind in ("weight", "statistics")  # what stays wrong cannot be left out
        if bool(said) != ends:
            found.append(said or "nothing was said")
        if said and kind != "statistics":
            found += [] if f"at step {step}" in said or kind == "weight" else [said]
            named = "images" in said or family == "router" or "Nothing was saved" in said
            found += [] if named else ["no images named"]
        poison = Poison.latest
        if kind != "statistics" and poison.before != poison.after:
            found.append("state changed")
        if not ends and poison.skipped != 1:
            found.append(f"{poison.skipped} skipped")
        found += _saved(where)
        if kind != "statistics":
            found += _replayed(where, kind)
    return Outcome(case, not found, ", ".join(found[:4]))


def _saved(folder: Path) -> list[str]:
    """Checkpoints with values that are no numbers."""
    found = []
    for file in folder.rglob("*.ckpt"):
        tensors = runs.content(folder, file.stem)["state_dict"]
        lost = [
            name for name, value in tensors.items() if value.is_floating_point() and not bool(value.isfinite().all())
        ]
        found += [f"{file.name} holds {lost[0]}"] if lost else []
    return found


def _replayed(folder: Path, kind: str) -> list[str]:
    """What replay says otherwise than it should: a gradient that a callback broke is whole this time."""
    dumps = sorted(folder.glob("dump_step_*.pt"))
    if not dumps:
        return ["no dump"]
    with runs.quiet() as text:
        try:
            trace = replay(compose_command("replay", [f"file={dumps[0]}"]))
        except SystemExit as error:
            return [] if kind == "gradient" and error.code == 1 else [f"replay ends with {error.code}"]
    if kind == "gradient":
        return ["replay finds what a callback did"]
    first = {"input": "before: ", "target": "before: ", "weight": "before: the weights"}[kind]
    return [] if first in text.getvalue() or trace.found() else [f"replay says {text.getvalue()}"]


ROWS = [
    Row(
        f"R8.{number}",
        f"NaN or inf in pixels, boxes, weights, gradients, running statistics, every family; on_nonfinite={policy}",
        "no update is made of it: weights, buffers and moments keep their hash; images are named; nothing of it is "
        "saved; replay finds it, and says of a broken gradient that it was not the model"
        + ("; the run finishes" if policy == "skip" else ""),
        lambda folder, policy=policy: poisoned(policy, folder),
        seconds,
    )
    for number, (policy, seconds) in enumerate([("stop", 110), ("skip", 110)], start=1)
]
