"""What `data.batch_size` means to the commands that only evaluate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from dyndet.calibrate import calibrate
from dyndet.cli.compose import build, compose_command, compose_experiment
from dyndet.data.datamodule import DetectionDataModule
from dyndet.evaluate import evaluate
from dyndet.lightning.detection import DetectionModule
from dyndet.lightning.joint import JointModule

SMALL = ["data.size=32", "data.val_images=6", "data.batch_size=5", "data.val_batch_size=4", "head.depth=1"]
COMMANDS = {
    "evaluate": (evaluate, ["trainer.accelerator=cpu"]),
    "calibrate": (calibrate, ["device=cpu", "thresholds=[0.0]", "latency_images=0"]),
}


@pytest.fixture(params=["now", "before"])
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Of an untrained detector; "before" there was a batch size of evaluation."""
    config = compose_experiment(None, SMALL)
    categories = build(config.data.module.val)().categories
    weights = {f"detector.{name}": value for name, value in build(config.detector).state_dict().items()}
    content = OmegaConf.to_container(config)
    if request.param == "before":
        del content["data"]["val_batch_size"], content["data"]["module"]["val_batch_size"]  # type: ignore[index,union-attr]
    extra = {"config": content, "categories": [{"id": item.id, "name": item.name} for item in categories]}
    torch.save({"state_dict": weights, "dyndet": extra}, tmp_path / "untrained.ckpt")
    return tmp_path / "untrained.ckpt"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("keys", "sizes"),
    [
        (["data.batch_size=null"], {"now": 4, "before": 5}),
        (["data.batch_size=1"], {"now": 1, "before": 1}),
        (["data.batch_size=3"], {"now": 3, "before": 3}),
    ],
)
def test_a_given_batch_size_is_that_of_evaluation(
    command: str, keys: list[str], sizes: dict[str, int], checkpoint: Path, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: list[int | None] = []
    original = DetectionDataModule.val_dataloader

    def val_dataloader(self: DetectionDataModule) -> DataLoader:
        loader = original(self)
        seen.append(loader.batch_size)
        return loader

    monkeypatch.setattr(DetectionDataModule, "val_dataloader", val_dataloader)
    task, more = COMMANDS[command]
    task(compose_command(command, [f"ckpt={checkpoint}", f"output_dir={checkpoint.parent}", *more, *keys]))
    assert set(seen) == {sizes[request.node.callspec.params["checkpoint"]]}


@pytest.mark.parametrize("kind", [DetectionModule, JointModule])
def test_a_process_without_images_validates_nothing(
    kind: type[DetectionModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More processes than images: each has one batch, so that all meet where they exchange what they found."""
    config = compose_experiment("shapes_dy_tiny", ["data.val_images=1", "data.size=32"])
    data = build(config.data.module)
    data.setup("validate")
    module = kind(build(config.detector).eval(), categories=data.categories)
    seen = []
    for rank in range(3):
        monkeypatch.setattr("dyndet.data.datamodule._rank_and_world_size", lambda rank=rank: (rank, 3))
        (batch,) = data.val_dataloader()
        batch = data.transfer_batch_to_device(batch, torch.device("cpu"), 0)
        seen.append((len(batch.targets), len(module.validation_step(batch, 0)["detections"])))  # type: ignore[index]
    assert seen == [(1, 1), (0, 0), (0, 0)]
    assert len(module.ap.image_ids) == 1
