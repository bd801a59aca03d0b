"""Values that Lightning or torch would choke on are named by their keys; Lightning's own options are keys."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional
from torch.optim import SGD
from torch.utils.data import DataLoader

from dyndet.cli.arguments import check_arguments
from dyndet.cli.configured import about_a_value, check_ranges
from dyndet.errors import UserError

TRAINER = OmegaConf.load(Path(__file__).parents[2] / "conf" / "trainer" / "default.yaml")


def test_options_of_lightning_stand_as_lightning_has_them() -> None:
    text = (Path(__file__).parents[2] / "conf" / "trainer" / "default.yaml").read_text()
    listed = OmegaConf.create(text.partition("# From here on as Lightning has them")[2].partition("\n")[2])
    defaults = {name: item.default for name, item in inspect.signature(Trainer.__init__).parameters.items()}
    expected = {"limit_train_batches", "limit_val_batches", "deterministic", "benchmark", "overfit_batches",
                "fast_dev_run", "detect_anomaly"}  # fmt: skip
    assert expected <= set(listed) and dict(listed) == {name: defaults[name] for name in listed}
    for name in ("accumulate_grad_batches", "max_time", "num_nodes"):
        assert TRAINER[name] == defaults[name]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.max_steps", 0), ("trainer.max_epochs", -2), ("trainer.accumulate_grad_batches", 0),
        ("trainer.val_check_interval", 0), ("trainer.check_val_every_n_epoch", 0), ("data.num_workers", -1),
        ("optim.optimizer.lr", -1), ("seed", -1), ("seed", "abc"), ("compile", "maybe"),
    ],
)  # fmt: skip
def test_a_number_out_of_its_range_is_named(key: str, value: Any) -> None:
    config = OmegaConf.create({})
    OmegaConf.update(config, key, value)
    with pytest.raises(UserError, match=rf"^{key} must be .*, got {value!r}"):
        check_ranges(config)


def test_lists_in_place_of_numbers_and_paths_are_named() -> None:
    optimizer = {"_target_": "dyndet.lightning.optim.build_optimizer", "_partial_": True, "lr": [1e-3, 1e-4]}
    with pytest.raises(UserError, match=r"^optim\.lr must be a number, got \[0\.001, 0\.0001\]$"):
        check_arguments(OmegaConf.create({"optim": optimizer})["optim"])


def test_what_a_library_refuses_is_told_from_a_mistake_of_ours() -> None:
    def caught(call: Any) -> Exception:
        with pytest.raises(Exception) as raised:
            call()
        return raised.value

    parameters = [nn.Parameter(nn.Linear(1, 1).weight)]
    assert "-1" in str(about_a_value(caught(lambda: SGD(parameters, lr=-1))))
    assert "num_workers" in str(about_a_value(caught(lambda: DataLoader([1], num_workers=-1))))  # pyright: ignore
    tiny = nn.Linear(1, 3).weight.new_zeros(1, 3, 1, 1)
    refused = caught(lambda: functional.batch_norm(tiny, None, None, training=True))
    assert "larger data.batch_size" in str(about_a_value(refused))
    assert "Permission" in str(about_a_value(PermissionError(13, "Permission denied", "/x")))
    assert about_a_value(caught(lambda: int("x"))) is None
    assert about_a_value(caught(lambda: [].index(3))) is None
