"""Runs of a small static detector on a few generated images, six steps per epoch, and ways to disturb them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dyndet.cli.compose import compose_experiment
from dyndet.train import train

TINY = [
    "data.size=64", "data.train_images=24", "data.val_images=2", "data.batch_size=4", "trainer.accelerator=cpu",
    "neck.channels=16", "head=plain_small", "head.num_convs=1", "~callbacks.progress", "~callbacks.preview",
    "~callbacks.density", "trainer.log_every_n_steps=1", "logger=[]", "~callbacks.learning_rate",
    "optim.optimizer.lr=2e-3",
]  # fmt: skip


def run(folder: Path, *overrides: str) -> dict[str, float]:
    return train(compose_experiment("shapes_dyn", [*TINY, f"output_dir={folder}", *overrides]))


def content(folder: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def last(folder: Path) -> str:
    return f"ckpt_path={folder}/checkpoints/last.ckpt"


def same_weights(one: Path, other: Path) -> bool:
    a, b = (content(folder)["state_dict"] for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Cut(Callback):
    """A power cut in some batch: after it, or amid its backward pass."""

    def __init__(self, batch: int, when: str) -> None:
        self.batch, self.when = batch, when
        self.batches = 0

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.batches += 1
        self._cut("backward")

    def on_train_batch_end(self, *args: Any) -> None:
        self._cut("end")

    def _cut(self, when: str) -> None:
        if (self.batches, self.when) == (self.batch, when):
            raise KeyError("power cut")


def cut(batch: int, when: str) -> str:
    return f"+callbacks.cut={{_target_: {__name__}.Cut, batch: {batch}, when: {when}}}"
