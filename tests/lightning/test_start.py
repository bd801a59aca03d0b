"""Where a run starts: from another's weights, or from the middle of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dyndet import build_detector
from dyndet.checkpoints.read import read_checkpoint
from dyndet.checkpoints.start_from import start_from, train_random_layers
from dyndet.cli.compose import compose_experiment
from dyndet.errors import UserError
from dyndet.structures import Category
from dyndet.train import train

TINY = [
    "data.size=64", "data.train_images=24", "data.val_images=8", "data.batch_size=4", "trainer.accelerator=cpu",
    "neck.channels=16", "head=plain_small", "head.num_convs=1", "optim.schedule=null", "~callbacks.progress",
]  # fmt: skip


def run(folder: Path, *overrides: str) -> dict[str, float]:
    return train(compose_experiment("shapes_dyn", [*TINY, f"output_dir={folder}", *overrides]))


def content(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended in the middle of an epoch of six steps."""
    folder = tmp_path_factory.mktemp("stopped")
    run(folder, "trainer.max_steps=4")
    return folder


def test_a_run_that_max_steps_stopped_goes_on_in_the_same_epoch(stopped: Path, tmp_path: Path) -> None:
    run(tmp_path / "whole", "trainer.max_steps=9")
    whole = content(tmp_path / "whole")
    for name in ("best", "last"):
        run(tmp_path / name, "trainer.max_steps=9", f"ckpt_path={stopped}/checkpoints/{name}.ckpt")
        resumed = content(tmp_path / name)
        assert whole["global_step"] == resumed["global_step"] == 9
        assert whole["epoch"] == resumed["epoch"]
        for key, value in whole["state_dict"].items():
            assert torch.equal(value, resumed["state_dict"][key]), (name, key)


def test_a_run_starts_from_the_weights_of_another_data_set(stopped: Path, tmp_path: Path) -> None:
    init = stopped / "checkpoints" / "last.ckpt"
    overrides = ["neck.channels=16", "head.norm_groups=4", "head.depth=1", "predictor.num_classes=7"]
    config = compose_experiment("shapes_dyn", overrides)
    detector = build_detector("shapes_dyn", overrides)
    message = start_from(detector, init, config)
    weights = {name.removeprefix("detector."): value for name, value in content(stopped)["state_dict"].items()}
    filled = detector.state_dict()
    for part in ("backbone", "neck", "predictor.box", "predictor.centerness"):
        names = [name for name in filled if name.startswith(part)]
        assert names and all(torch.equal(filled[name], weights[name]) for name in names)
    assert filled["predictor.cls.weight"].shape[0] == 7
    assert "predictor.cls (2)" in message and "head.cls (" in message and "neck" not in message
    # As a run: one step at a rate of zero leaves what it took as it was.
    run(tmp_path, f"init={init}", "trainer.max_steps=1", "optim.optimizer.lr=0.0", "data.batch_size=2")
    ours = content(tmp_path)["state_dict"]
    assert all(torch.equal(ours[name], value) for name, value in content(stopped)["state_dict"].items()
               if "running" not in name and "num_batches" not in name)  # fmt: skip


def test_random_layers_are_not_frozen(stopped: Path, tmp_path: Path) -> None:
    run(tmp_path / "scratch", "backbone.frozen_stages=1", "trainer.max_steps=1")
    scratch = read_checkpoint(tmp_path / "scratch" / "checkpoints" / "last.ckpt")
    assert scratch.config.backbone.frozen_stages == -1
    init = stopped / "checkpoints" / "last.ckpt"
    for more, left in ((["init=x"], 1), (["backbone.weights=a.pth"], 1), ([], -1)):
        config = compose_experiment("shapes_dyn", ["backbone.frozen_stages=1", *more])
        message = train_random_layers(config)
        assert config.backbone.frozen_stages == left
        assert ("all of it trains" in message) == (left == -1)
    run(tmp_path / "given", f"init={init}", "backbone.frozen_stages=1", "trainer.max_steps=1")
    before, after = content(stopped)["state_dict"], content(tmp_path / "given")["state_dict"]
    stem = [name for name in after if name.startswith("detector.backbone.body.conv1") and name.endswith("weight")]
    assert stem and all(torch.equal(before[name], after[name]) for name in stem)


def test_other_classes_of_the_same_number_start_anew(stopped: Path) -> None:
    init = stopped / "checkpoints" / "last.ckpt"
    config = compose_experiment("shapes_dyn", TINY)
    names = ["circle", "square", "triangle", "star"]
    for renamed in ([], ["cat"]):
        detector = build_detector("shapes_dyn", TINY)
        categories = [Category(7 + i, name) for i, name in enumerate([*renamed, *names][:4])]
        state = torch.get_rng_state()
        message = start_from(detector, init, config, categories)
        assert torch.equal(state, torch.get_rng_state())
        weights = content(stopped)["state_dict"]
        kept = {
            name for name, value in detector.state_dict().items() if torch.equal(weights[f"detector.{name}"], value)
        }
        anew = detector.state_dict().keys() - kept
        assert anew <= {"predictor.cls.weight", "predictor.cls.bias"} and ("predictor.cls.weight" in anew) == bool(
            renamed
        )
        assert ("anew (other classes): predictor.cls (2)" in message) == bool(renamed)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("backbone=lite0", "whose backbone is not that of"),
        ("preprocess.bgr=true", "add 'preprocess.bgr=False'"),
        ("preprocess.mean=[0.5,0.5,0.5]", r"preprocess.mean=\[0.485"),
        ("init=nowhere.ckpt", "set init to a file"),
    ],
)
def test_weights_that_do_not_fit_are_refused(stopped: Path, tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        run(tmp_path, f"init={stopped}/checkpoints/last.ckpt", "backbone.weights=none", override)


def test_what_cannot_be_resumed_says_so(stopped: Path, tmp_path: Path) -> None:
    last = stopped / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match=r"is of another detector than this experiment.*takes what fits"):
        run(tmp_path, f"ckpt_path={last}", "head.num_convs=2")
    with pytest.raises(UserError, match=r"the command that started it$"):
        run(tmp_path, f"ckpt_path={last}", "backbone=lite0", "backbone.weights=none")
    (tmp_path / "cut.ckpt").write_bytes(last.read_bytes()[:50_000])
    for key in ("ckpt_path", "init"):
        with pytest.raises(UserError, match=r"cut\.ckpt cannot be read as a checkpoint"):
            run(tmp_path, f"{key}={tmp_path}/cut.ckpt")
    released = {key: value for key, value in content(stopped).items() if key in ("dyndet", "state_dict")}
    torch.save(released, tmp_path / "converted.ckpt")  # what conversion writes
    with pytest.raises(UserError, match="holds no run to go on with: init="):
        run(tmp_path, f"ckpt_path={tmp_path}/converted.ckpt")
