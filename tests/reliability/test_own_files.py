"""Checkpoints of strangers name no file that a run which goes on from them would remove."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dyndet.lightning.writing import CheckpointFiles
from tiny_runs import content, run

KEYS = ["best_model_path", "kth_best_model_path", "last_model_path", "best_k_models"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("begun") / "run"
    run(folder, "trainer.max_epochs=1", "callbacks.last.every_n_train_steps=2")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local://{}", "file://{}", "{}", "{run}/checkpoints/../../precious", "{}/note.ckpt"])
def test_nothing_of_others_is_removed(name: str, begun: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "note.ckpt").write_text("mine")
    shutil.copytree(begun, tmp_path / "run")
    saved = content(tmp_path / "run")
    named = name.format(precious, run=tmp_path / "run")
    for state in saved["callbacks"].values():
        if "best_model_path" in state:
            state |= dict.fromkeys(KEYS[:3], named) | {"best_k_models": {named: torch.tensor(0.0)}}
            state["dirpath"] = str(tmp_path / "run" / "checkpoints")
    (tmp_path / "evil").mkdir()
    torch.save(saved, tmp_path / "evil" / "file.ckpt")
    keys = ["trainer.max_epochs=2", "callbacks.last.every_n_train_steps=1", f"ckpt_path={tmp_path}/evil/file.ckpt"]
    run(tmp_path / "run", *keys)
    assert content(tmp_path / "run")["global_step"] == 12
    assert (precious / "note.ckpt").read_text() == "mine"


def test_only_checkpoints_are_removed(tmp_path: Path) -> None:
    (tmp_path / "folder.ckpt").mkdir()
    for name in ("a.ckpt", "a.txt"):
        (tmp_path / name).touch()
    for path in tmp_path.iterdir():
        CheckpointFiles().remove_checkpoint(path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "folder.ckpt"}
