"""Averaged weights."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dyndet.lightning.ema import EMA


class Waits(TorchDispatchMode):
    """Counts how often a value of a tensor is asked for, which on a GPU waits for it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def module(layers: int = 1) -> LightningModule:
    """Floating-point weights of two types, and buffers of three."""
    made = LightningModule()
    made.layers = torch.nn.ModuleList(torch.nn.Linear(3, 2) for _ in range(layers))
    made.double = torch.nn.Linear(2, 2, dtype=torch.float64)
    made.norm = torch.nn.BatchNorm1d(4)
    made.register_buffer("flag", torch.tensor(False))
    return made


def started(callback: EMA, current: LightningModule, device: str = "cpu") -> Any:
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)), global_step=0)
    callback.setup(trainer, current, "fit")
    return trainer


def step(callback: EMA, trainer: Any, current: LightningModule) -> None:
    """Changes all of a module's state, then the end of a training step."""
    with torch.no_grad():
        for value in current.state_dict().values():
            value.copy_(torch.randn(value.shape) if value.is_floating_point() else torch.randint(2, value.shape))
    trainer.global_step += 1
    callback.on_train_batch_end(trainer, current, None, None, 0)


def averages(callback: EMA) -> dict[str, Tensor]:
    assert callback._average_model is not None
    return callback._average_model.module.state_dict()


def test_the_average_is_where_the_module_will_be() -> None:
    """At setup the module is still on the CPU: a copy of every weight to it in every step would be dear."""
    current = LightningModule()
    current.layer = torch.nn.Linear(2, 2)
    callback = EMA()
    started(callback, current, "meta")
    assert callback._average_model is not None
    assert {parameter.device.type for parameter in callback._average_model.parameters()} == {"meta"}
    assert current.layer.weight.device.type == "cpu"


@pytest.mark.parametrize("ramp", [None, 3.0])
def test_the_average_follows_its_formula(ramp: float | None) -> None:
    current = module()
    callback = EMA(decay=0.4, ramp=ramp)
    trainer = started(callback, current)
    expected: dict[str, Tensor] = {}
    for updates in range(12):
        step(callback, trainer, current)
        rate = min(0.4, (1 + updates) / (10 + updates)) if ramp is None else 0.4 * (1 - math.exp(-updates / ramp))
        for name, value in current.state_dict().items():
            share = rate if value.is_floating_point() and updates else 0  # the first update and counters copy
            old = expected.get(name, torch.zeros(())).double()
            expected[name] = share * old + (1 - share) * value.double()
        for name, value in averages(callback).items():
            assert value.dtype == current.state_dict()[name].dtype
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layers", [1, 40])
def test_no_update_waits_for_the_device(layers: int) -> None:
    current = module(layers)
    callback = EMA()
    trainer = started(callback, current)
    with Waits() as waits:
        for _ in range(3):
            step(callback, trainer, current)
    assert waits.count == 0
    with Waits() as waits:
        bool(current.flag)
    assert waits.count == 1


def test_the_count_of_updates_is_resumed() -> None:
    """The decay of a resumed run grows on from where it was."""
    current = module()
    callback, resumed = EMA(ramp=5.0), EMA(ramp=5.0)
    trainer = started(callback, current)
    for _ in range(4):
        step(callback, trainer, current)
    checkpoint: dict[str, Any] = {"state_dict": current.state_dict()}
    callback.on_save_checkpoint(trainer, current, checkpoint)
    assert checkpoint["averaging_state"]["n_averaged"] == 4

    again = module()
    later = started(resumed, again)
    later.global_step = trainer.global_step
    resumed.load_state_dict(callback.state_dict())
    resumed.on_load_checkpoint(later, again, checkpoint)
    for _ in range(3):
        with torch.random.fork_rng():
            step(callback, trainer, current)
        step(resumed, later, again)
    for name, value in averages(callback).items():
        assert torch.equal(value, averages(resumed)[name]), name
    assert averages(resumed)["norm.num_batches_tracked"].dtype == torch.int64
