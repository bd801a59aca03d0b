"""Step 2 of a cascade and its commands: what the published code of DynamicDet trips over (the table is in
tests/models/test_dynamicdet_traps.py).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor, nn
from torch.optim import SGD

from dyndet.calibrate import calibrate
from dyndet.checkpoints.read import read_checkpoint
from dyndet.cli.compose import build, compose_command, compose_experiment
from dyndet.data.datamodule import DetectionDataModule
from dyndet.data.shapes import ShapesDataset
from dyndet.evaluate import evaluate
from dyndet.lightning.lessons import LessonDataModule, Lessons
from dyndet.lightning.router_module import Lesson
from dyndet.models.detectors.dynamic import DynamicDetector
from dyndet.predict import predict
from dyndet.train import train

SMALL = ["data.size=64", "data.train_images=20", "data.val_images=4", "data.batch_size=4", "trainer.accelerator=cpu"]


def composed(experiment: str, *overrides: str) -> DictConfig:
    return compose_experiment(experiment, [*SMALL, *overrides])


def cascade(config: DictConfig) -> DynamicDetector:
    torch.manual_seed(0)
    detector = build(config.detector).eval()
    assert isinstance(detector, DynamicDetector)
    return detector


def saved(path: Path, config: DictConfig, detector: nn.Module, **more: Any) -> Path:
    """A checkpoint as training leaves it."""
    data = build(config.data.module)
    data.setup("validate")
    categories = [{"id": category.id, "name": category.name} for category in data.categories]
    weights = {f"detector.{name}": value for name, value in detector.state_dict().items()}
    extra = {"config": OmegaConf.to_container(config), "categories": categories}
    torch.save({"state_dict": weights, "dyndet": extra, **more}, path)
    return path


# Training


def test_step_2_takes_weights_alone(tmp_path: Path) -> None:
    """Anchors that a search has found come along; the optimizer and the epochs of step 1 do not; one epoch will do."""
    config = composed("shapes_dy_yolo")
    before = cascade(config)
    for part, factor in ((before.first, 1.25), (before.second, 1.5)):
        part.predictor.anchors.mul_(factor)  # type: ignore[attr-defined]
    state = SGD([{"params": [p]} for p in before.parameters()], lr=0.1).state_dict()
    past = {"epoch": 300, "global_step": 10**6, "optimizer_states": [state], "lr_schedulers": [], "callbacks": {}}
    init = saved(tmp_path / "init.ckpt", config, before, **past, **{"pytorch-lightning_version": "2.6.6"})
    keys = [f"init={init}", f"output_dir={tmp_path}", f"router.cache={tmp_path}/lessons", "router.batch_size=8"]
    train(composed("shapes_dy_yolo", "+router=exact", *keys, "trainer.max_epochs=1"))
    last = tmp_path / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    assert (content["global_step"], len(content["optimizer_states"])) == (3, 1)  # 20 images in batches of 8
    after = read_checkpoint(last).weights
    for name, value in before.state_dict().items():
        assert torch.equal(after[name], value), name
    assert sum("anchors" in name for name in after) == 2


@pytest.mark.parametrize("optim", ["adamw_1x", "one_cycle", "sgd_1x", "sgd_12_epochs", "yolo", "online"])
def test_schedules_of_one_step(optim: str) -> None:
    keys = ["+router=online", "init=x"] if optim == "online" else [f"optim={optim}"]
    schedule = build(compose_experiment("shapes_dy_tiny", keys).optim.schedule)
    for total_steps in (1, 2, 3):
        optimizer = SGD([{"params": [nn.Parameter(torch.zeros(1))], "biases": False}], lr=0.01, momentum=0.9)
        scheduler = schedule(optimizer, total_steps=total_steps)
        for _ in range(total_steps):
            assert all(math.isfinite(group["lr"]) for group in optimizer.param_groups)
            optimizer.step()
            if scheduler.last_epoch + 1 < total_steps:
                scheduler.step()


def orders(data: DetectionDataModule) -> list[list[int]]:
    """Indices of two epochs as they are drawn."""
    data.setup("fit")
    batches: Any = data.train_dataloader().batch_sampler
    drawn = []
    for epoch in range(2):
        batches.sampler.set_epoch(epoch)
        drawn.append([index for batch in batches for _, index in batch])
    return drawn


@pytest.mark.parametrize("kind", ["step 1", "online", "lessons"])
def test_one_process_shuffles(kind: str) -> None:
    if kind == "lessons":
        lessons = Lessons(Lesson(torch.zeros(20, 3), torch.zeros(2, 20)), ShapesDataset(length=1).categories)
        validation = ShapesDataset(length=1, size=32)
        data: DetectionDataModule = LessonDataModule(train=lessons, val=validation, num_classes=3, batch_size=4)  # type: ignore[arg-type]
    else:
        keys = ["+router=online", "init=x"] if kind == "online" else []
        data = build(composed("shapes_dy_tiny", *keys).data.module)
    first, second = orders(data)
    assert sorted(first) == sorted(second) == list(range(20))
    assert len({tuple(first), tuple(second), tuple(range(20))}) == 3


# Commands


def difficulties(ckpt: Path, source: Path, out: Path, *keys: str) -> dict[str, tuple[str, float]]:
    """Route and difficulty of every file, each predicted by itself."""
    predict(compose_command("predict", [f"ckpt={ckpt}", f"source={source}", f"out={out}", "device=cpu", *keys]))
    rows = json.loads((out / "detections.json").read_text())
    return {Path(row["file"]).name: (row["route"], row["difficulty"]) for row in rows}


def test_difficulty_is_what_the_router_is_asked_for(tmp_path: Path) -> None:
    config = composed("shapes_dy_tiny", "+router=exact", "init=x")
    detector = cascade(config)
    assert detector.router is not None
    nn.init.zeros_(detector.router.out.weight)
    nn.init.constant_(detector.router.out.bias, math.log(0.8 / 0.2))
    ckpt = saved(tmp_path / "routed.ckpt", config, detector)
    Image.new("RGB", (64, 64), "white").save(tmp_path / "a.png")
    for threshold, route in ((0.3, "easy"), (0.1, "hard")):
        found = difficulties(ckpt, tmp_path / "a.png", tmp_path / route, f"speed=threshold:{threshold}", "gates=true")
        assert found == {"a.png": (route, pytest.approx(0.2))}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images of many shapes, each with a box, as COCO has them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    entries, boxes = [], []
    for index, size in enumerate([(64, 48), (64, 96), (128, 64), (64, 64)], 1):
        Image.effect_noise(size, 24 * index).convert("RGB").save(folder / f"{index}.png")
        entries.append({"id": index, "file_name": f"{index}.png", "width": size[0], "height": size[1]})
        boxes.append({"id": index, "image_id": index, "category_id": 1, "bbox": [8, 8, 30, 24], "area": 720})
    boxes = [{**box, "iscrowd": 0} for box in boxes]
    categories = [{"id": 1, "name": "a"}]
    content = {"images": entries, "annotations": boxes, "categories": categories}
    (tmp_path / "all.json").write_text(json.dumps(content))
    return folder


def test_calibrated_scores_are_those_of_single_images(photos: Path, tmp_path: Path) -> None:
    """Padding is pooled, so thresholds hold where images are padded as in calibration."""
    layout = [f"data.{split}_annotations={tmp_path}/all.json" for split in ("train", "val")]
    layout += [f"data.{split}_images={photos}" for split in ("train", "val")]
    keys = ["data=coco", *layout, "data.num_classes=1", "data.val_short_edge=64", "data.max_size=128"]
    keys += ["preprocess.centred=true", "data.num_workers=0", "+router=exact", "init=x"]
    config = compose_experiment("shapes_dy_tiny", keys)
    detector = cascade(config)
    assert detector.router is not None
    detector.router.out.weight.data.mul_(50)
    ckpt = saved(tmp_path / "routed.ckpt", config, detector)

    def calibrated(name: str, *keys: str) -> tuple[Path, Tensor]:
        options = [f"ckpt={ckpt}", f"out={tmp_path / name}", f"output_dir={tmp_path}", "latency_images=0", "device=cpu"]
        calibration = calibrate(compose_command("calibrate", [*options, *keys]))
        return tmp_path / name, torch.tensor(calibration.difficulty).sigmoid()

    file, alone = calibrated("alone.ckpt")
    found = difficulties(file, photos, tmp_path / "out", "speed=hard_fraction:0.5")
    expected = torch.tensor(sorted(difficulty for _, difficulty in found.values()))
    torch.testing.assert_close(alone, expected, rtol=0, atol=1e-5)
    assert [route for route, _ in found.values()].count("hard") == 2
    together = calibrated("together.ckpt", "data.batch_size=4")[1]  # on one canvas
    assert float((together - expected).abs().max()) > 1e-3


def test_the_folded_network_is_what_is_counted(tmp_path: Path) -> None:
    """YOLOv7 costs less with its branches folded; all commands tell the cost of the network that they run."""
    config = composed("shapes_dy_yolo", "+router=exact", "init=x")
    options = [f"ckpt={saved(tmp_path / 'routed.ckpt', config, cascade(config))}", f"output_dir={tmp_path}"]
    calibration = calibrate(compose_command("calibrate", [*options, "latency_images=0", "device=cpu"]))

    def evaluated(*keys: str) -> float:
        return evaluate(compose_command("evaluate", [*options, "trainer.accelerator=cpu", *keys]))["macs/total_mean"]

    assert calibration.points[0].macs == evaluated("speed=easy") < evaluated("speed=easy", "fuse=false")
