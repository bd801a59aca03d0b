"""Loggers get no value of the environment that was not named."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dyndet.cli.hyperparameters import hyperparameters
from dyndet.errors import UserError
from tiny_runs import run


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "s3cret")
    monkeypatch.setenv("NUMBER", "3")


@pytest.mark.parametrize(
    ("value", "hidden", "shown"),
    [
        ("${oc.env:TOKEN}", "$TOKEN", "s3cret"),
        ("a/${token}/b", "a/$TOKEN/b", "a/s3cret/b"),
        ("${oc.decode:${oc.env:NUMBER}}", "$NUMBER", 3),
        ("${oc.select:token}", "$TOKEN", "s3cret"),
        ("${oc.env:${name}}", "$TOKEN", "s3cret"),
        ("${oc.env:UNSET,fallback}", "fallback", "fallback"),
        (["${token}", {"x": "${token}"}], ["$TOKEN", {"x": "$TOKEN"}], ["s3cret", {"x": "s3cret"}]),
        ("???", "???", "???"),
    ],
)
def test_values_stand_there_by_their_names(value: object, hidden: object, shown: object) -> None:
    config = OmegaConf.create({"token": "${oc.env:TOKEN}", "name": "TOKEN", "value": value})
    assert hyperparameters(config)["value"] == hidden
    assert hyperparameters(config, named=["TOKEN", "NUMBER"])["value"] == shown
    assert config.token == "s3cret"  # as before


@pytest.mark.parametrize("named", ["TOKEN", [1]])
def test_names_are_a_list(named: list[str]) -> None:
    with pytest.raises(UserError, match=r"logged_env=\[COCO\]"):
        hyperparameters(OmegaConf.create({}), named=named)


def test_a_run_leaves_no_secret_behind(tmp_path: Path) -> None:
    run(
        tmp_path, "trainer.max_epochs=1", "logger=[csv,tensorboard]", "+note=key ${oc.env:TOKEN}",
        "logged_env=[NUMBER]", "+count=${oc.env:NUMBER}",
    )  # fmt: skip
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"key $TOKEN" in path.read_bytes() for path in files)
    assert not [path for path in files if b"s3cret" in path.read_bytes()]
