"""Runs that diverge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dyndet.cli.compose import compose_experiment
from dyndet.errors import DivergedError
from dyndet.models.detectors.dense import DenseDetector
from dyndet.structures import Losses
from dyndet.train import train

TINY = [
    "data.size=64", "data.train_images=24", "data.val_images=4", "data.batch_size=4", "trainer.accelerator=cpu",
    "neck.channels=16", "head=plain_small", "head.num_convs=1", "trainer.max_epochs=2", "trainer.log_every_n_steps=2",
    "~callbacks.progress",
]  # fmt: skip


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_diverged_run_ends_and_keeps_its_last_good_checkpoint(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, calls = DenseDetector.losses, []

    def diverging(self: DenseDetector, *args: Any) -> Losses:
        calls.append(1)
        result: Losses = losses(self, *args)
        if len(calls) == 9:
            for name in result.terms:
                result.terms[name] = result.terms[name] + float("nan")  # leaves gradients as they are
        return result

    monkeypatch.setattr(DenseDetector, "losses", diverging)
    config = compose_experiment("shapes_dyn", [*TINY, f"output_dir={tmp_path}", f"on_nonfinite={policy}"])
    if policy == "skip":
        with pytest.warns(
            UserWarning, match=r"at step 8, so the update was left out: images .* \(number 1 of this run"
        ):
            train(config)
        assert len(calls) == 12 and "train/skipped" in next(tmp_path.rglob("metrics.csv")).read_text()
        return
    with pytest.raises(DivergedError, match=r"the loss is no number \(cls, box, centerness\) at step 8, "):
        train(config)
    assert len(calls) == 9  # six steps are an epoch
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 6
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


@pytest.mark.parametrize(
    "end",
    ["trainer.max_epochs=8", "trainer.max_epochs=1", "trainer.max_steps=4", "callbacks.last.every_n_train_steps=3"],
)
def test_no_checkpoint_is_written_of_weights_that_are_no_numbers(end: str, tmp_path: Path) -> None:
    wild = ["optim.optimizer.lr=1e30", "optim.schedule=null", end]
    with pytest.raises(DivergedError, match=r"no numbers? .*at step .* lower optim\.optimizer\.lr"):
        train(compose_experiment("shapes_dyn", [*TINY, *wild, f"output_dir={tmp_path}"]))
    assert not list(tmp_path.rglob("*.ckpt"))
