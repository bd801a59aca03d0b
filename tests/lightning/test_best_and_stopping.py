"""Which checkpoint is the best, and runs that end early."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer

from dyndet.errors import UserError
from dyndet.lightning import estimate
from dyndet.lightning.estimate import Estimate, spoken
from dyndet.lightning.stopping import EarlyStop, seconds_of
from dyndet.metrics.average_precision import CocoMetric
from tiny_runs import content, last, run


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the next validations find."""
    found: list[float] = []
    monkeypatch.setattr(CocoMetric, "compute", lambda self: {"AP": found.pop(0)})
    return found


def known_best(folder: Path, name: str) -> float:
    states = content(folder, name)["callbacks"].items()
    (best,) = [state["best_model_score"] for key, state in states if "val/AP" in key and "best_model_score" in state]
    return float(best)


@pytest.mark.parametrize(("values", "step"), [([0.1, 0.2], 18), ([0.2, 0.1], 12)])
def test_the_validation_after_the_run_counts(
    tmp_path: Path, scores: list[float], values: list[float], step: int
) -> None:
    scores += values
    run(tmp_path, "trainer.max_epochs=3", "trainer.check_val_every_n_epoch=2")
    assert content(tmp_path, "best")["global_step"] == step and content(tmp_path)["global_step"] == 18
    for name in ("best", "last"):  # a run that goes on from either knows what is to be beaten
        assert known_best(tmp_path, name) == pytest.approx(max(values) if step == 18 or name == "last" else values[0])


def test_a_run_that_is_validated_at_its_end_alone_has_a_best_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, "trainer.max_epochs=1", "trainer.check_val_every_n_epoch=5")
    assert content(tmp_path, "best")["global_step"] == content(tmp_path)["global_step"] == 6


def test_early_stop_counts_validations_and_goes_on_with_more_patience(tmp_path: Path, scores: list[float]) -> None:
    scores += [0.1, 0.3, 0.2, 0.3, 0.4, 0.4, 0.4]
    run(tmp_path, "trainer.max_epochs=8", "early_stop=2")
    assert content(tmp_path)["global_step"] == 24 and content(tmp_path, "best")["global_step"] == 12
    run(tmp_path, "trainer.max_epochs=6", "early_stop=3", last(tmp_path))
    assert content(tmp_path)["global_step"] == 36 and content(tmp_path, "best")["global_step"] == 30
    assert len(scores) == 1


def test_early_stop_can_begin_later_and_end() -> None:
    off, on = EarlyStop(), EarlyStop(3)
    on.load_state_dict(off.state_dict())
    on.wait_count = 2
    resumed = EarlyStop(7)
    resumed.load_state_dict(on.state_dict())
    assert (resumed.wait_count, resumed.patience) == (2, 7)
    off.load_state_dict(on.state_dict())
    assert not off.enabled
    with pytest.raises(ValueError, match="at least 1"):
        EarlyStop(0)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("00:30:00", 1800),
        ("1:00:00:01", 86401),
        ("90m", 5400),
        ("1h30m", 5400),
        ("2d", 172800),
        ("45 s", 45),
        (1800, 1800),
    ],
)
def test_times_are_read(text: str | int, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "soon", "00:00:00", 0, "1.5h"])
def test_what_is_no_time_is_refused(text: str | int) -> None:
    with pytest.raises(UserError, match="is no time: write hours"):
        seconds_of(text)


@pytest.mark.parametrize(
    ("each", "limits", "words"),
    [
        (3.0, {"max_epochs": 5}, "about 4 min of training to go until 5 epochs (3 s per batch"),  # 100 - 21 batches
        (0.5, {"max_epochs": 5}, None),  # less than a minute
        (90.0, {"max_epochs": -1, "max_steps": 1000}, "about 24.5 h of training to go until 1000 steps"),
    ],
)
def test_the_length_of_a_run_is_said(
    each: float, limits: dict[str, Any], words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, said = count(), []
    monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=lambda: next(clock) * each * 20))
    monkeypatch.setattr(estimate, "rank_zero_info", said.append)
    trainer: Any = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **limits)
    trainer.fit_loop.max_batches = 20
    callback = Estimate()
    callback.on_train_start(trainer, LightningModule())
    for batch in range(30):
        trainer.fit_loop.epoch_loop.batch_progress.current.ready = batch % 20 + 1
        trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = batch + 1
        trainer.fit_loop.epoch_progress.current.completed = batch // 20
        callback.on_train_batch_end(trainer)
    assert [line[: len(words or "")] for line in said] == ([] if words is None else [words])
    assert spoken(59) == "59 s"
