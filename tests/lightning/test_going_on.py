"""Runs that go on with other settings than they began with, and from places where it is hard to go on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR

from dyndet.checkpoints.changes import check_changes
from dyndet.cli.compose import compose_experiment
from dyndet.errors import UserError
from dyndet.lightning import stopping
from dyndet.lightning.going_on import continue_optimizer, parameter_names
from dyndet.lightning.optim import build_optimizer, one_cycle
from tiny_runs import content, cut, last, run, same_weights

# Other settings


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs with one cycle."""
    folder = tmp_path_factory.mktemp("stopped")
    run(folder, "trainer.max_epochs=2")
    return folder


def cycle(step: int, total_steps: int) -> float:
    """The rate that torch's own schedule has at a step."""
    optimizer = AdamW([nn.Parameter(torch.zeros(1))], lr=2e-3)
    scheduler = one_cycle(optimizer, total_steps=total_steps, pct_start=0.15)
    for _ in range(step):
        optimizer.step()
        scheduler.step()
    return optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(("batch_size", "steps"), [(8, 3), (4, 6), (3, 8)])
def test_a_schedule_goes_on_at_the_same_share_of_the_run(
    stopped: Path, tmp_path: Path, batch_size: int, steps: int
) -> None:
    run(tmp_path, "trainer.max_epochs=3", f"data.batch_size={batch_size}", last(stopped))
    now = content(tmp_path)
    assert now["global_step"] == 12 + steps and now["epoch"] == 2
    assert now["lr_schedulers"][0]["last_epoch"] == 3 * steps
    assert now["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(cycle(3 * steps, 3 * steps))


def test_changed_rates_are_applied_and_said(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    keys = ["optim.optimizer.lr=1e-4", "optim.optimizer.weight_decay=0.3", "optim.schedule.pct_start=0.9"]
    with caplog.at_level("INFO"):
        run(tmp_path, "trainer.max_epochs=3", "trainer.max_steps=13", *keys, last(stopped))
    said = caplog.text + capsys.readouterr().err
    for change in ("lr 0.002 -> 0.0001", "weight_decay 0.05 -> 0.3", "pct_start 0.15 -> 0.9", "max_epochs 2 -> 3"):
        assert change in said
    group = content(tmp_path)["optimizer_states"][0]["param_groups"][0]
    assert (group["max_lr"], group["weight_decay"]) == (1e-4, 0.3)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["optim=sgd_1x"], r"optim.optimizer.optimizer was torch.optim.AdamW and is torch.optim.SGD.*init="),
        (["optim.schedule=null"], r"optim.schedule was dyndet.lightning.optim.one_cycle and is none.*init="),
        (["data.num_classes=3"], r"other categories than the data has: there were 4 and are 3.*init="),
    ],
)
def test_what_a_resumed_run_cannot_change_is_refused(
    stopped: Path, tmp_path: Path, keys: list[str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        run(tmp_path, "trainer.max_epochs=4", *keys, last(stopped))


@pytest.mark.parametrize(("field", "value"), [("name", "dog"), ("id", 7)])
def test_other_categories_of_the_same_number_are_refused(
    stopped: Path, tmp_path: Path, field: str, value: str | int
) -> None:
    saved = content(stopped)
    saved["dyndet"]["categories"][1][field] = value
    torch.save(saved, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=rf"label 1 was .*{value}.* and is 'square' \(id 2\)"):
        run(tmp_path, "trainer.max_epochs=3", f"ckpt_path={tmp_path}/other.ckpt")


def test_differences_name_the_key_that_was_set() -> None:
    then, now = (compose_experiment("shapes_dyn", keys) for keys in ([], ["data.batch_size=2", "head=plain_small"]))
    said = check_changes("x.ckpt", _plain(then), now)
    assert "data.batch_size 8 -> 2" in said and "head FineGrainedHead -> PlainHead" in said
    assert "data.module" not in said  # which refers to data.batch_size
    assert check_changes("x.ckpt", _plain(then), compose_experiment("shapes_dyn", ["init=a.ckpt", "name=b"])) == ""


def _plain(config: DictConfig) -> Any:
    return OmegaConf.to_container(config, resolve=False)


# The optimizer's state


class Two(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.detector = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 2)})


def adamw(module: Two, **scales: float) -> AdamW:
    optimizer = build_optimizer(module.detector, optimizer=AdamW, lr=0.1, weight_decay=0.01, lr_scales=scales)
    assert isinstance(optimizer, AdamW)
    return optimizer


def saved_state(module: Two, optimizer: AdamW) -> dict[str, Any]:
    return {
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
        "dyndet": {"config": {"optim": 1}, "optimised": parameter_names(module, optimizer)},
    }


def test_moments_stay_with_their_parameters_when_groups_change() -> None:
    module = Two()
    before = adamw(module, backbone=0.5)
    for index, parameter in enumerate(module.parameters()):
        parameter.grad = torch.full_like(parameter, index + 1.0)
    before.step()
    after = adamw(module, head=0.5)
    checkpoint = saved_state(module, before)
    continue_optimizer(checkpoint, module, after, None, 10)
    after.load_state_dict(checkpoint["optimizer_states"][0])
    for index, (name, parameter) in enumerate(module.named_parameters()):
        assert torch.equal(after.state[parameter]["exp_avg"], torch.full_like(parameter, 0.1 * (index + 1.0))), name
    rates = {id(p): group["lr"] for group in after.param_groups for p in group["params"]}
    assert [rates[id(p)] for p in module.parameters()] == [0.1, 0.1, 0.05, 0.05]
    del checkpoint["dyndet"]["optimised"]  # as checkpoints were before
    with pytest.raises(UserError, match="grouped otherwise"):
        checkpoint["optimizer_states"] = [adamw(module).state_dict()]
        continue_optimizer(checkpoint, module, after, None, 10)


@pytest.mark.parametrize(
    ("schedule", "refused"),
    [
        (lambda given: LambdaLR(given, lambda _: 1.0), False),
        (lambda given: ExponentialLR(given, 0.9), True),
    ],
)
def test_schedules_that_go_from_rate_to_rate_cannot_change(schedule: Callable[..., Any], refused: bool) -> None:
    module = Two()
    optimizer = adamw(module)
    checkpoint = saved_state(module, optimizer)
    if refused:
        with pytest.raises(UserError, match="ExponentialLR cannot take other settings"):
            continue_optimizer(checkpoint, module, optimizer, schedule(optimizer), 10)
    else:
        continue_optimizer(checkpoint, module, optimizer, schedule(optimizer), 10)


# Inside a window of gradient accumulation: six batches are windows of four and two

WINDOW = "trainer.accumulate_grad_batches=4"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(folder, WINDOW, "trainer.max_epochs=2")
    return folder


@pytest.mark.parametrize("batch", [5, 9])
def test_an_interruption_inside_a_window_changes_nothing(whole: Path, tmp_path: Path, batch: int) -> None:
    with pytest.raises(KeyError, match="power cut"):
        run(tmp_path, WINDOW, "trainer.max_epochs=2", cut(batch, "end"))
    assert "gradients" in content(tmp_path)["callbacks"]["ExactResume"]
    run(tmp_path / "on", WINDOW, "trainer.max_epochs=2", last(tmp_path))
    assert same_weights(whole, tmp_path / "on")


def test_a_time_limit_ends_where_it_is_reached_and_the_run_goes_on_exactly(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        clock = count()
        patch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        run(tmp_path, WINDOW, "trainer.max_epochs=2", "time_limit=5s")
    assert content(tmp_path)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"] == 5
    assert content(tmp_path, "best")["global_step"] == 1
    run(tmp_path / "on", WINDOW, "trainer.max_epochs=2", last(tmp_path))
    assert same_weights(whole, tmp_path / "on")


def test_a_run_without_an_end_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    clock = count()
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    run(tmp_path, "trainer.max_epochs=-1", "time_limit=3s")
    assert not [item for item in recwarn if "does not fit" in str(item.message)]
    weights = "backbone.weights=gone.pth"  # the checkpoint has them all
    run(tmp_path / "on", "trainer.max_epochs=-1", "time_limit=2s", last(tmp_path), weights)
    after = content(tmp_path / "on")
    assert after["global_step"] == after["lr_schedulers"][0]["last_epoch"] == 5
    rate = 2e-3 * (0.001 + 0.999 * 5 / 100)  # of a warm-up of 100 steps
    assert after["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(rate)


@pytest.mark.parametrize(("batch", "when", "window"), [(6, "backward", 4), (5, "end", 2)])
def test_lost_gradients_are_computed_again(tmp_path: Path, batch: int, when: str, window: int) -> None:
    """Amid a backward pass they are no batch's, and with another window they are not wanted."""
    with pytest.raises(KeyError, match="power cut"):
        run(tmp_path, WINDOW, "trainer.max_epochs=1", cut(batch, when))
    with pytest.warns(UserWarning, match="not exact: 1 batches are done again"):
        run(tmp_path / "on", f"trainer.accumulate_grad_batches={window}", "trainer.max_epochs=1", last(tmp_path))
    after = content(tmp_path / "on")
    assert after["global_step"] == 2
    assert after["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"] == 6


def test_a_place_in_an_epoch_is_kept_in_other_batches(tmp_path: Path) -> None:
    """Four batches of four images are two of eight; the third ends the epoch."""
    run(tmp_path, "trainer.max_epochs=2", "trainer.max_steps=4")
    with pytest.warns(UserWarning, match="batch_size was 4 and is 8"):
        run(tmp_path / "on", "trainer.max_epochs=1", "data.batch_size=8", last(tmp_path))
    after = content(tmp_path / "on")
    assert after["global_step"] == 5 and after["lr_schedulers"][0]["last_epoch"] == 3
