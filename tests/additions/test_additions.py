"""A head, a predictor, a backbone and a data set from outside the package, as docs/architecture.md tells to add them:
trained, calibrated, evaluated and drawn by the usual commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import dyndet
from dyndet.calibrate import calibrate
from dyndet.cli.compose import build, compose_command, compose_experiment
from dyndet.errors import UserError
from dyndet.evaluate import evaluate
from dyndet.predict import predict
from dyndet.report.draw import to_picture
from dyndet.train import train

HERE = Path(__file__).parent
OWN = f"hydra.searchpath=[file://{HERE / 'conf'}]"
ALL = ["head=spot", "predictor=nearest", "backbone=conv", "data=bars"]


@pytest.fixture(scope="module", autouse=True)
def _importable() -> None:
    sys.path.insert(0, str(HERE))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("additions")
    length = ["trainer.accelerator=cpu", "trainer.max_epochs=4", "trainer.check_val_every_n_epoch=4"]
    train(compose_command("train", [OWN, *ALL, *length, f"output_dir={folder}"]))
    return folder


@pytest.mark.parametrize("name", ["spot_head", "nearest_predictor", "conv_backbone", "bars_dataset"])
def test_each_is_written_in_less_than_sixty_lines(name: str) -> None:
    assert len((HERE / f"{name}.py").read_text().splitlines()) < 60


@pytest.mark.parametrize("part", ["head=spot", "predictor=nearest", "backbone=conv"])
def test_each_fits_the_parts_that_are_there(part: str) -> None:
    config = compose_experiment("shapes_dyn", [OWN, "head=plain_small", part])
    detector = build(config.detector).train()
    images = torch.rand(2, 3, 64, 96)
    targets = [{"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1])}] * 2
    losses = detector.losses(images, targets)
    assert losses.total.isfinite() and ("budget" in losses.terms) == (part == "head=spot")
    losses.total.backward()
    assert all(p.grad is not None for p in detector.parameters() if p.requires_grad)


def test_it_is_validated_priced_and_drawn(trained: Path) -> None:
    result = json.loads((trained / "result.json").read_text())
    assert 0 <= result["val/AP"] <= 1 and "val/AP/wide" in result
    assert 0 < result["macs/head_ratio"] <= 1 and "gates/spot.conv/P3" in result
    assert list((trained / "previews").iterdir())


def test_it_is_calibrated_timed_and_asked_for_a_speed(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "calibrated.ckpt"
    ckpt = f"ckpt={trained / 'checkpoints' / 'last.ckpt'}"
    with pytest.raises(UserError, match="trust=true"):
        calibrate(compose_command("calibrate", [ckpt]))
    options = ["trust=true", f"out={file}", "thresholds=[0,0.5,1]", "latency_images=1", f"output_dir={tmp_path}"]
    calibration = calibrate(compose_command("calibrate", [ckpt, *options]))
    assert [point.threshold for point in calibration.points] == [1, 0.5, 0]
    assert calibration.points[0].macs < calibration.points[-1].macs
    detector = dyndet.load_detector(file, speed="easy", trust=True)
    assert detector.head.gate_threshold == 1
    evaluated = evaluate(
        compose_command("evaluate", [f"ckpt={file}", "trust=true", "speed=threshold:0.5", f"output_dir={tmp_path}"])
    )
    assert 0 <= evaluated["val/AP"] <= 1


def test_its_gates_are_drawn_over_photos(trained: Path, tmp_path: Path) -> None:
    to_picture(torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8)).save(tmp_path / "photo.png")
    ckpt = trained / "checkpoints" / "last.ckpt"
    options = [f"ckpt={ckpt}", "trust=true", f"source={tmp_path / 'photo.png'}", "gates=true", f"out={tmp_path}"]
    folder = predict(compose_command("predict", options))
    (found,) = json.loads((folder / "detections.json").read_text())
    assert found["gmacs"] > 0 and Path(found["picture"]).is_file()
    assert all(row["category_id"] in (3, 7) for row in found["detections"])
