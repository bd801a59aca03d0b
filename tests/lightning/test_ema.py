"""Averaged weights."""

from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import LightningModule

from dyndet.lightning.ema import EMA


def test_the_average_is_where_the_module_will_be() -> None:
    """At setup the module is still on the CPU: a copy of every weight to it in every step would be dear."""
    module = LightningModule()
    module.layer = torch.nn.Linear(2, 2)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")))
    callback = EMA()
    callback.setup(trainer, module, "fit")
    assert callback._average_model is not None
    assert {parameter.device.type for parameter in callback._average_model.parameters()} == {"meta"}
    assert module.layer.weight.device.type == "cpu"
