"""Masks from end to end: trained on generated shapes, validated, exported, drawn."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

import dyndet
from dyndet.checkpoints.read import read_checkpoint
from dyndet.cli.compose import build, compose_command, compose_experiment
from dyndet.data.datamodule import DetectionDataModule
from dyndet.data.shapes import ShapesDataset
from dyndet.data.transforms import Resize
from dyndet.errors import UserError
from dyndet.evaluate import evaluate
from dyndet.lightning.collect import Collect
from dyndet.lightning.detection import DetectionModule
from dyndet.metrics.export import write_ground_truth
from dyndet.models.detectors.base import Detector, Images, RawMaps
from dyndet.models.preprocess import Preprocess
from dyndet.predict import predict
from dyndet.report.draw import visible
from dyndet.routing import Routing
from dyndet.structures import Detections, ImageBatch, Losses, Target
from dyndet.train import train

TINY = [
    "data.size=64", "data.train_images=24", "data.val_images=6", "data.batch_size=4", "trainer.accelerator=cpu",
    "trainer.max_epochs=3", "trainer.log_every_n_steps=1", "trainer.check_val_every_n_epoch=3", "neck.channels=16",
    "predictor.roi.box.head.hidden=32", "predictor.roi.head.hidden=16", "predictor.roi.box.score_threshold=0.01",
]  # fmt: skip


def segm(truth: dict[str, Any], results: list[dict[str, Any]]) -> COCOeval:
    coco = COCO()
    coco.dataset = truth
    coco.createIndex()
    judge = COCOeval(coco, coco.loadRes(results), "segm")
    judge.evaluate(), judge.accumulate(), judge.summarize()
    return judge


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("masks")
    return folder, train(compose_experiment("shapes_mask_rcnn", [*TINY, f"output_dir={folder}"]))


def test_a_run_trains_masks_and_validates_them(trained: tuple[Path, dict[str, float]]) -> None:
    folder, metrics = trained
    with (folder / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/mask"]]
    assert len(rows) == 18
    for name, share in (("train/loss", 0.9), ("train/mask", 0.98)):  # masks start at log 2 and wait for good regions
        history = [float(row[name]) for row in rows]
        assert sum(history[-4:]) < share * sum(history[:4]), name
    assert {"val/segm/AP", "val/segm/AP50", "val/segm/APm", "val/segm/AP/circle", "val/AP"} <= metrics.keys()
    assert metrics["macs/mask_mean"] > 0
    assert json.loads((folder / "result.json").read_text())["val/segm/AP"] == metrics["val/segm/AP"]
    assert list((folder / "previews").iterdir())


def test_evaluating_gives_what_training_printed(
    trained: tuple[Path, dict[str, float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = trained[0] / "checkpoints" / "last.ckpt"
    again = evaluate(
        compose_command("evaluate", [f"ckpt={checkpoint}", f"output_dir={tmp_path}", "trainer.accelerator=cpu"])
    )
    assert "of masks   AP " in capsys.readouterr().out
    for key in ("val/AP", "val/segm/AP", "val/segm/AP50", "macs/mask_mean"):
        assert again[key] == pytest.approx(trained[1][key], abs=1e-6), key
    results = json.loads((tmp_path / "detections.json").read_text())
    assert results and all(row["segmentation"]["size"] == [64, 64] for row in results)
    saved = read_checkpoint(checkpoint)
    data = build(saved.config.data.module)
    data.setup("validate")
    assert segm(write_ground_truth(data.val), results).stats[0] == pytest.approx(again["val/segm/AP"], abs=6e-8)


def test_predict_writes_and_draws_masks(trained: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    image = np.array(ShapesDataset(length=1, size=(48, 80))[0].image.permute(1, 2, 0))
    Image.fromarray(image).save(tmp_path / "shapes.png")
    checkpoint, out = trained[0] / "checkpoints" / "last.ckpt", tmp_path / "out"
    arguments = [f"ckpt={checkpoint}", f"source={tmp_path / 'shapes.png'}", f"out={out}", "device=cpu"]
    predict(compose_command("predict", [*arguments, "score_threshold=0.01", "pictures=png"]))
    ((entry),) = json.loads((out / "detections.json").read_text())
    detector = dyndet.load_detector(checkpoint)
    (found,) = detector.detect([torch.from_numpy(image).permute(2, 0, 1)])
    assert found.masks is not None and len(found) == len(entry["detections"]) > 0
    for mask, row in zip(found.masks, entry["detections"], strict=True):
        assert np.array_equal(rle.decode(row["segmentation"]), mask.numpy())
    with Image.open(entry["picture"]) as picture:
        scale = picture.width // 80
        pixels = np.array(picture)[picture.height - 48 * scale :: scale, ::scale].astype(int)  # below the caption
    shown = visible(found, 0.01).masks
    assert shown is not None
    tinted = shown.any(0).numpy()
    assert tinted.any()
    assert (np.abs(pixels - image).sum(2)[tinted] > 0).mean() > 0.9


def test_training_without_masks_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no masks.*data\.masks=true"):
        train(compose_experiment("shapes_mask_rcnn", [*TINY, f"output_dir={tmp_path}", "data.masks=false"]))


class Shifted(Detector):
    """Finds every object of a set of shapes, its mask two pixels too far right, whatever size it sees."""

    def __init__(self, dataset: ShapesDataset) -> None:
        super().__init__()
        self.preprocess, self.budget = Preprocess(), None
        self.targets = iter([dataset[index].target for index in range(len(dataset))])

    strides = property(lambda self: [8])
    has_masks = property(lambda self: True)

    def losses(self, images: Images, targets: Sequence[Target | dict[str, Tensor]]) -> Losses:
        raise NotImplementedError

    def detect_with_routing(self, images: Images) -> tuple[list[Detections], Routing | None]:
        assert isinstance(images, ImageBatch)
        found = []
        for _ in range(len(images)):
            target = next(self.targets)
            assert target.masks is not None
            scores = 1 / (2 + torch.arange(len(target.labels)))
            found.append(Detections(target.boxes, scores, target.labels, target.masks.roll(2, 2)))
        return found, None

    def raw_outputs(self, images: Images) -> RawMaps:
        raise NotImplementedError


def test_validation_logs_what_pycocotools_says(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = ShapesDataset(length=10, size=128, seed=2, load_masks=True)
    data = DetectionDataModule(
        train=dataset, val=dataset, num_classes=3, batch_size=4, val_transform=Resize((192, 160)), drop_last=False
    )
    module = DetectionModule(Shifted(dataset), categories=dataset.categories)
    monkeypatch.setattr(module, "static", lambda size, routed: {})
    collected = Collect(masks=True)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=[collected],
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    (logged,) = trainer.validate(module, data, verbose=False)
    assert collected.images == 10
    for row in collected.facts.detections:
        del row["bbox"]
    judge = segm(write_ground_truth(dataset), collected.facts.detections)
    names = ["AP", "AP50", "AP75", "APs", "APm"]
    expected = {f"val/segm/{name}": value for name, value in zip(names, judge.stats, strict=False)}
    assert {key: logged[key] for key in expected} == pytest.approx(expected, abs=6e-8)
    assert logged["val/AP"] == pytest.approx(1) and 0.3 < logged["val/segm/AP"] < 0.9
