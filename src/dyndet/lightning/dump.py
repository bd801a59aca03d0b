"""Steps that went wrong, kept in a file: what `dyndet replay` runs again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from dyndet.checkpoints.read import Checkpoint, read_checkpoint
from dyndet.errors import UserError
from dyndet.lightning.nonfinite import first_lost
from dyndet.lightning.router_module import Lesson
from dyndet.structures import Batch, ImageBatch, Target

MOST = 3
"""Dumps of a run; of more, the newest are kept."""

_TARGET = [item.name for item in fields(Target) if item.name not in ("segmentations", "truth")]


class Seen:
    """A batch of a step, as it was when the step began.

    Args:
        batch: of images, or of lessons.
        random: state of the random generators before it.

    Attributes:
        loss: of the batch, when it is known.
    """

    def __init__(self, batch: Any, random: dict[str, Any]) -> None:
        self.batch = batch
        self.random = random
        self.loss: Tensor | None = None

    def lost(self) -> bool:
        """Whether the loss is no number; waits for the device."""
        return self.loss is not None and not bool(torch.isfinite(self.loss).all())

    def faulty(self) -> bool:
        """Whether its loss or what it holds is no number; waits for the device."""
        return self.lost() or first_lost(self.given()) is not None

    def names(self) -> list[str]:
        """Id and file of every image."""
        targets = self.batch.targets if isinstance(self.batch, Batch) else []
        return [f"{target.image_id} {target.path}".strip() for target in targets]

    def given(self) -> Iterator[tuple[str, Tensor]]:
        """What of the batch could be no number, by name."""
        if not isinstance(self.batch, Batch):
            yield from zip(("what the lessons show", "the losses of the lessons"), self.batch, strict=True)
            return
        for name, pixels, target in zip(self.names(), self.batch.images.pixels, self.batch.targets, strict=True):
            if pixels.is_floating_point():
                yield f"the pixels of image {name}", pixels
            yield f"the boxes of image {name}", target.boxes


@dataclass(frozen=True)
class Dump:
    """What a dump holds.

    Attributes:
        saved: configuration, categories and weights from before the update.
        batches: of the step, with their random states.
        step: how many updates were made before.
        precision: of the run's trainer.
        fault: what was seen.
        offset: the state of a router's offset; None where no router was trained.
    """

    saved: Checkpoint
    batches: list[Seen]
    step: int
    precision: str
    fault: str
    offset: list[float] | None


def dump_step(
    folder: Path, trainer: Trainer, module: LightningModule, batches: Sequence[Seen], *, step: int, fault: str
) -> Path:
    """Writes a step to `dump_step_NUMBER.pt`, whole or not at all, and drops the oldest of more than `MOST`.

    Args:
        folder: of the run.
        trainer: of the run.
        module: with weights and buffers from before the step.
        batches: of the step.
        step: its number.
        fault: what was seen.
    """
    extra: dict[str, Any] = {}
    module.on_save_checkpoint(extra)
    content = {
        "dyndet": extra.get("dyndet"),
        "state_dict": module.state_dict(),
        "step": step,
        "precision": str(trainer.precision),
        "fault": fault,
        "batches": [{"random": seen.random, **_plain(seen.batch)} for seen in batches],
    }
    folder.mkdir(parents=True, exist_ok=True)
    rank = f"_rank{trainer.global_rank}" if trainer.global_rank else ""
    file = folder / f"dump_step_{step:06d}{rank}.pt"
    part = file.with_name(f"{file.name}.part")
    try:
        with part.open("wb") as stream:
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    for old in sorted(folder.glob(f"dump_step_{'[0-9]' * 6}{rank}.pt"))[:-MOST]:
        with suppress(OSError):
            old.unlink()
    return file


def read_dump(path: str | Path, *, trust: bool = False) -> Dump:
    """Reads a dump.

    Args:
        path: the file.
        trust: see `read_checkpoint`.

    Raises:
        UserError: if it is none, is damaged, or names code that is not dyndet's.
    """
    saved = read_checkpoint(path, key="file", trust=trust)
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if "batches" not in content:
        raise UserError(f"file={path} is a checkpoint, but no step that went wrong: give a dump_step_....pt of a run")
    try:
        batches = [_seen(item) for item in content["batches"]]
        texts = (str(content["precision"]), str(content["fault"]))
        return Dump(saved, batches, int(content["step"]), *texts, content["dyndet"].get("offset"))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"file={path} is a damaged dump: {type(error).__name__} {error}") from error


def _plain(batch: Any) -> dict[str, Any]:
    """A batch as plain containers of tensors on the CPU."""
    if not isinstance(batch, Batch):
        pooled, losses = batch
        return {"pooled": pooled.cpu(), "losses": losses.cpu()}
    images = {item.name: getattr(batch.images, item.name) for item in fields(ImageBatch)}
    targets = [{name: getattr(target, name) for name in _TARGET} for target in batch.targets]
    return {"images": _on_cpu(images), "targets": [_on_cpu(target) for target in targets]}


def _on_cpu(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in values.items()}


def _seen(item: dict[str, Any]) -> Seen:
    if "pooled" in item:
        batch: Any = Lesson(item["pooled"], item["losses"])
    else:
        targets = [Target(**{**target, "original_size": tuple(target["original_size"])}) for target in item["targets"]]
        batch = Batch(ImageBatch(**item["images"]), targets)
    return Seen(batch, item["random"])
