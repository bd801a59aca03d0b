"""The commands in process, on a few tiny generated images: train, resume, evaluate, predict, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import dyndet
from dyndet.checkpoints.read import read_checkpoint, resume_path
from dyndet.cli.compose import build, compose_command, compose_experiment
from dyndet.data.sources import find_sources
from dyndet.errors import UserError
from dyndet.evaluate import evaluate
from dyndet.metrics.average_precision import CocoMetric
from dyndet.metrics.export import write_ground_truth
from dyndet.metrics.validation import read_validation
from dyndet.predict import predict
from dyndet.report.__main__ import report
from dyndet.train import train

TINY = [
    "data.size=64", "data.train_images=24", "data.val_images=10", "data.batch_size=4", "trainer.accelerator=cpu",
    "trainer.max_epochs=2", "head.depth=1", "neck.channels=16", "head.norm_groups=4",
    "predictor.postprocess.score_threshold=0.01",
]  # fmt: skip


def run(folder: Path, *overrides: str) -> dict[str, float]:
    return train(compose_experiment("shapes_dyn", [*TINY, f"output_dir={folder}", *overrides]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("trained")
    return folder, run(folder)


def test_a_run_leaves_checkpoints_numbers_and_pictures(trained: tuple[Path, dict[str, float]]) -> None:
    folder, metrics = trained
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    result = json.loads((folder / "result.json").read_text())
    assert result["val/AP"] == metrics["val/AP"]
    assert 0 < result["macs/head_ratio"] <= 1 and result["macs/total_mean"] > result["macs/head_used_mean"]
    pictures = sorted((folder / "previews").iterdir())
    assert [path.name for path in pictures] == ["step_000006.png", "step_000012.png"]
    with Image.open(pictures[0]) as picture:
        assert picture.width > 5 * 64
    rows = (folder / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    assert "val/AP" in rows[0] and "gates/cls.0.depth/P3" in rows[0]


def test_a_run_leaves_what_its_last_validation_found(trained: tuple[Path, dict[str, float]]) -> None:
    folder, metrics = trained
    left = read_validation(folder)
    assert left is not None and len(left.targets) == 10 and not left.hard
    again = CocoMetric(left.categories)
    again.update(left.detections, left.targets)
    assert {f"val/{key}": value for key, value in again.compute().items()} == pytest.approx(
        {key: value for key, value in metrics.items() if key.startswith("val/")}, nan_ok=True, abs=1e-9
    )
    assert sum(found.macs or 0 for found in left.detections) / 10 == pytest.approx(metrics["macs/total_mean"])
    for target in left.targets:
        with Image.open(target.path) as picture:
            assert picture.size == (64, 64)


@pytest.mark.parametrize("impl", ["dense", "gather"])
def test_evaluating_gives_what_training_printed(
    trained: tuple[Path, dict[str, float]], tmp_path: Path, impl: str
) -> None:
    folder, metrics = trained
    again = evaluate(
        compose_command(
            "evaluate",
            [
                f"ckpt={folder}/checkpoints/last.ckpt",
                f"output_dir={tmp_path}",
                f"impl={impl}",
                "trainer.accelerator=cpu",
            ],
        )
    )
    for key in ("val/AP", "val/AP50", "macs/head_ratio", "macs/total_mean", "macs/head_used_max"):
        assert again[key] == pytest.approx(metrics[key], abs=1e-6), key
    # pycocotools on the exported json gives the AP that was printed.
    saved = read_checkpoint(folder / "checkpoints" / "last.ckpt")
    data = build(saved.config.data.module)
    data.setup("validate")
    truth = COCO()
    truth.dataset = write_ground_truth(data.val)
    truth.createIndex()
    found = truth.loadRes(str(tmp_path / "detections.json"))
    judge = COCOeval(truth, found, "bbox")
    judge.evaluate(), judge.accumulate(), judge.summarize()
    assert judge.stats[0] == pytest.approx(again["val/AP"], abs=1e-6)
    assert judge.stats[1] == pytest.approx(again["val/AP50"], abs=1e-6)


def test_evaluating_times_the_head_against_the_fixed_one(
    trained: tuple[Path, dict[str, float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [f"ckpt={trained[0]}/checkpoints/last.ckpt", f"output_dir={tmp_path}", "trainer.accelerator=cpu"]
    metrics = evaluate(compose_command("evaluate", [*keys, "impl=gather", "timing=2"]))
    assert metrics["time/head_ratio"] > 0
    assert metrics["macs/head_executed_mean"] >= metrics["macs/head_asked_mean"] > 0
    printed = capsys.readouterr().out
    assert "of the time of the fixed head (impl=gather, 2 batches)" in " ".join(printed.split())


def test_gather_and_dense_execution_detect_the_same(trained: tuple[Path, dict[str, float]]) -> None:
    path = trained[0] / "checkpoints" / "last.ckpt"
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    dense, gather = (dyndet.load_detector(path, impl=impl).detect(images) for impl in ("dense", "gather"))
    assert sum(len(found) for found in dense) > 0
    for a, b in zip(dense, gather, strict=True):
        assert torch.allclose(a.boxes, b.boxes, atol=1e-4) and torch.allclose(a.scores, b.scores, atol=1e-4)
        assert torch.equal(a.labels, b.labels)


class StopAt(Callback):
    """An interruption: leaves a checkpoint and raises after so many steps."""

    def __init__(self, step: int, path: str) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise KeyError("power cut")


@pytest.mark.parametrize("step", [3, 6])
def test_an_interrupted_run_continues_exactly(
    trained: tuple[Path, dict[str, float]], tmp_path: Path, step: int
) -> None:
    cut = tmp_path / "cut.ckpt"
    stop = f"+callbacks.stop={{_target_: {__name__}.StopAt, step: {step}, path: {cut}}}"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        with pytest.raises(KeyError, match="power cut"):
            run(tmp_path / "first", stop)
    assert torch.load(cut, weights_only=True)["global_step"] == step
    metrics = run(tmp_path / "second", f"ckpt_path={cut}")
    expected = torch.load(trained[0] / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    actual = torch.load(tmp_path / "second" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[key], actual[key]) for key in expected)
    assert metrics["val/AP"] == trained[1]["val/AP"]


def test_averaged_weights_are_what_is_evaluated(tmp_path: Path) -> None:
    metrics = run(tmp_path / "run", "callbacks=[default,ema]", "callbacks.ema.decay=0.5", "trainer.max_epochs=1")
    again = evaluate(
        compose_command("evaluate", [f"ckpt={tmp_path}/run/checkpoints/last.ckpt", f"output_dir={tmp_path}"])
    )
    assert again["val/AP"] == pytest.approx(metrics["val/AP"], abs=1e-9)
    assert again["macs/head_ratio"] == pytest.approx(metrics["macs/head_ratio"], abs=1e-9)


def test_predict_draws_and_writes(trained: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    source = tmp_path / "photos"
    source.mkdir()
    for index in range(2):
        Image.new("RGB", (80, 60), (index * 90, 60, 200)).save(source / f"{index}.png")
    out = tmp_path / "out"
    predict(
        compose_command(
            "predict",
            [f"ckpt={trained[0]}/checkpoints/best.ckpt", f"source={source}", f"out={out}", "gates=true", "device=cpu"],
        )
    )
    results = json.loads((out / "detections.json").read_text())
    assert [Path(item["file"]).name for item in results] == ["0.png", "1.png"]
    assert all(item["gmacs"] > 0 and item["size"] == [60, 80] for item in results)
    assert {path.name for path in (out / "pictures").iterdir()} == {"0.jpg", "1.jpg"}


def test_report_of_runs(trained: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for index, ratio in enumerate((0.9, 0.3)):
        (runs / str(index) / ".hydra").mkdir(parents=True)
        (runs / str(index) / ".hydra" / "config.yaml").write_text("name: x\n")
        (runs / str(index) / ".hydra" / "overrides.yaml").write_text(f"- budget.weight={index}\n")
        numbers = json.loads((trained[0] / "result.json").read_text()) | {"macs/head_ratio": ratio}
        (runs / str(index) / "result.json").write_text(json.dumps(numbers))
    report(compose_command("report", [f"runs={runs}"]))
    assert "budget.weight" in (runs / "report.md").read_text()
    with Image.open(runs / "pareto.png") as picture:
        assert picture.width > 300


def test_files_that_are_not_checkpoints_are_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (Path.touch, (Path(tmp_path / "executed"),))  # type: ignore[return-value]

    torch.save({"state_dict": {}, "dyndet": Bomb()}, tmp_path / "bomb.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    (tmp_path / "empty.ckpt").touch()
    for name in ("bomb", "text", "other", "missing", "empty"):
        with pytest.raises(UserError, match=name):
            read_checkpoint(tmp_path / f"{name}.ckpt")
    assert not (tmp_path / "executed").exists()
    for wanted in ("last", str(tmp_path / "missing.ckpt")):
        with pytest.raises(UserError, match="ckpt_path"):
            resume_path(compose_experiment("shapes_dyn", ["name=never_run", f"ckpt_path={wanted}"]))


def test_sources_without_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images there"):
        find_sources(str(tmp_path))
