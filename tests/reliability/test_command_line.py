"""The commands as a user types them: mistakes, interruptions, several processes, sweeps."""

from __future__ import annotations

import json
import resource
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from commands import ENVIRONMENT, command, forked

TINY = [
    "+experiment=shapes_dyn", "data.size=64", "data.train_images=24", "data.val_images=10", "data.batch_size=4",
    "trainer.accelerator=cpu", "trainer.max_epochs=2", "head.depth=1", "neck.channels=16", "head.norm_groups=4",
    "predictor.postprocess.score_threshold=0.01", "~callbacks.progress",
]  # fmt: skip


def assert_one_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]


def seconds_of_processes() -> float:
    """Processor time of the finished child processes: unlike the clock, the same on a loaded machine."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.slow
def test_without_coco_the_way_out_is_named_at_once(tmp_path: Path) -> None:
    before = seconds_of_processes()
    result = command(tmp_path, "train", "+experiment=fcos_d8_dyn")
    assert_one_line(result, "instances_train2017.json", "data.root", "scripts/get_coco.py", "python -m dyndet.train")
    assert seconds_of_processes() - before < 15


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("train", ["+experiment=fcos_d8_dny"], ["fcos_d8_dny", "Did you mean 'fcos_d8_dyn'"]),
        ("train", ["callbacks=[default,ema_yolo]"], ["is now: callbacks=[default,ema]"]),
        ("train", ["budget.wieght=1"], ["budget.wieght", "budget.weight"]),
        ("train", ["backbone.weights=missing.pth"], ["missing.pth", "backbone.weights"]),
        ("train", ["data.num_classes=99"], ["num_classes"]),
        ("train", ["budget.weight=much"], ["budget", "much"]),
        ("train", ["ckpt_path=notes.txt"], ["notes.txt", "checkpoint"]),
        ("train", ["data=files"], ["data.root must be given"]),
        ("evaluate", ["ckpt=nowhere.ckpt"], ["nowhere.ckpt"]),
        ("evaluate", [], ["ckpt"]),
        ("report", ["runs=nowhere"], ["nowhere"]),
        ("report", ["runs=[a,b]"], ["runs must be one path"]),
        ("report", ["runs=nowhere", "full=x"], ["full=x: give a whole number"]),
        ("doctor", ["images=all"], ["images=all: give a whole number"]),
        ("train", ["ckpt_path=[a.ckpt]"], ["ckpt_path must be one path"]),
        ("train", ["ckpt_path=nowhere/run/checkpoints/last.ckpt"], ["no such file"]),
        ("train", ["data.size=abc"], ["abc", "a number of pixels"]),
        ("train", ["data.root", "=", "photos"], ["'data.root' sets nothing: write KEY=VALUE, without spaces"]),
    ],
)
def test_mistakes_cost_one_line(tmp_path: Path, name: str, arguments: list[str], words: list[str]) -> None:
    (tmp_path / "notes.txt").write_text("no checkpoint")
    assert_one_line(forked(tmp_path, name, *arguments), *words)
    assert not (tmp_path / "nowhere").exists()


def test_a_flag_takes_no_override_for_its_value(tmp_path: Path) -> None:
    result = forked(tmp_path, "report", "runs=there", "--info")
    assert result.returncode == 0 and "runs: there" in result.stdout, result.stderr


@pytest.mark.slow
def test_a_corrupt_image_costs_one_line_from_a_worker_too(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    broken = tmp_path / "images" / "broken.jpg"  # its header is fine, so only reading its pixels finds out
    Image.effect_noise((32, 32), 64).convert("RGB").save(broken)
    broken.write_bytes(broken.read_bytes()[:-600])
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 20, 20], "area": 400, "iscrowd": 0}
    entry = {"id": 1, "file_name": "broken.jpg", "width": 32, "height": 32}
    content = {"images": [entry], "annotations": [annotation], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "all.json").write_text(json.dumps(content))
    layout = [f"data.{split}_{key}={value}" for split in ("train", "val")
              for key, value in (("annotations", "all.json"), ("images", "images"))]  # fmt: skip
    rest = ["data.num_classes=1", "data.batch_size=1", "data.num_workers=1", "trainer.accelerator=cpu"]
    result = forked(tmp_path, "train", "data=coco", *layout, *rest, "~callbacks.progress")
    assert_one_line(result, "error: ", "broken.jpg")
    assert "worker" not in result.stderr.splitlines()[-1]


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """A run that has been validated once."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dyndet.train", *TINY, "trainer.max_epochs=200", *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # jobs in the background ignore it
    )
    deadline = time.monotonic() + 120
    while not list(folder.glob("outputs/*/*/checkpoints/last.ckpt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    return process


@pytest.mark.slow
def test_an_interrupted_run_prints_the_command_that_goes_on(tmp_path: Path) -> None:
    process = started(tmp_path, "optim.optimizer.lr=2e-3")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in output, output
    assert "interrupted by SIGINT at step" in output
    (line,) = [line for line in output.splitlines() if "python -m dyndet.train" in line]
    (run,) = tmp_path.glob("outputs/shapes_dyn/*")
    last = f"ckpt_path={run.relative_to(tmp_path)}/checkpoints/last.ckpt"
    assert shlex.split(line)[3:] == [*TINY, "trainer.max_epochs=200", "optim.optimizer.lr=2e-3", last]
    reached = json.loads((run / "result.json").read_text())["epoch"]
    result = forked(tmp_path, "train", *shlex.split(line)[3:], f"trainer.max_epochs={reached + 3}")
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.glob("outputs/shapes_dyn/*")] == [run.name]  # the same folder
    assert json.loads((run / "result.json").read_text())["step"] == 6 * (reached + 3)


@pytest.mark.slow
def test_two_processes_end_together(tmp_path: Path) -> None:
    """The first tells the other, which it has started."""
    process = started(tmp_path, "trainer.devices=2", "trainer.strategy=ddp")
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    )
    children = [int(pid) for pid in listed.stdout.split()]
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 143, output  # 128 + 15, what schedulers expect
    assert output.count("interrupted by SIGTERM at step") == 1 and "Traceback" not in output
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def test_a_key_may_be_added_that_is_there(tmp_path: Path) -> None:
    result = forked(tmp_path, "train", *TINY, "+trainer.accumulate_grad_batches=2", "--cfg=job", "--package=trainer")
    assert result.returncode == 0 and "accumulate_grad_batches: 2" in result.stdout, result.stderr


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(tmp_path: Path) -> None:
    result = forked(tmp_path, "train", *TINY)
    assert result.returncode == 0, result.stderr
    (run,) = tmp_path.glob("outputs/shapes_dyn/*")

    def evaluated(*arguments: str) -> dict[str, float]:
        # Batches of one image, so that both see the same batches whichever way the images are dealt out.
        line = [f"ckpt={run}/checkpoints/last.ckpt", "trainer.accelerator=cpu", "data.batch_size=1", *arguments]
        again = (command if arguments else forked)(tmp_path, "evaluate", *line)  # further processes start it again
        assert again.returncode == 0, again.stderr
        newest = max((tmp_path / "outputs" / "evaluate").iterdir(), key=lambda path: path.stat().st_mtime)
        return json.loads((newest / "result.json").read_text())

    together, alone = evaluated("trainer.devices=2", "trainer.strategy=ddp"), evaluated()
    for key in ("val/AP", "val/AP50", "macs/head_ratio", "macs/total_mean", "macs/head_used_min"):
        assert together[key] == pytest.approx(alone[key], abs=1e-6), key
    assert alone["val/AP"] > 0


@pytest.mark.slow
def test_every_job_of_a_sweep_trains_on_its_own_processes(tmp_path: Path) -> None:
    """Processes that join a job run that job alone: the same settings, and no folder of their own."""
    two = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.max_epochs=1"]
    line = [str(Path(sys.executable).with_name("dyndet")), "train", "-m", *TINY, *two, "budget.weight=0,5"]
    result = subprocess.run(
        line, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr
    (sweep,) = tmp_path.glob("multirun/shapes_dyn/*")
    assert not (tmp_path / "outputs").exists()
    alone = command(tmp_path, "train", *TINY, *two, "budget.weight=5")
    assert alone.returncode == 0, alone.stderr
    (run,) = tmp_path.glob("outputs/shapes_dyn/*")  # one folder
    results = [json.loads((folder / "result.json").read_text()) for folder in (sweep / "0", sweep / "1", run)]
    assert [result["step"] for result in results] == [3, 3, 3]  # 24 images, 2 processes of 4
    cheap, dear, same = (result["macs/head_soft_ratio"] for result in results)
    assert dear == pytest.approx(same, abs=1e-6)
    assert cheap != pytest.approx(same, abs=1e-6)
    # What they validated in training is what they measure afterwards.
    again = command(tmp_path, "evaluate", f"ckpt={run}/checkpoints/last.ckpt", "trainer.accelerator=cpu", *two[:2])
    assert again.returncode == 0, again.stderr
    (folder,) = (tmp_path / "outputs" / "evaluate").iterdir()
    measured = json.loads((folder / "result.json").read_text())
    for key in ("val/AP", "val/AP50", "val/AR100", "macs/head_ratio", "macs/total_mean", "macs/head_used_min"):
        assert measured[key] == pytest.approx(results[2][key], abs=1e-6), key


@pytest.mark.slow
def test_a_sweep_logs_one_offline_run_with_pictures_per_job(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    result = command(
        tmp_path, "train", "-m", *TINY, "budget.weight=0.01,1", "trainer.max_epochs=1", "logger=[csv,wandb]",
        "logger.wandb.offline=true",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (sweep,) = tmp_path.glob("multirun/shapes_dyn/*")
    runs = sorted(sweep.glob("*/wandb/offline-run-*"))
    assert [run.parts[-3] for run in runs] == ["0", "1"]
    for run in runs:
        assert list(run.glob("files/media/images/preview*.png"))
        assert list(run.glob("files/media/table/*gates*.json"))
    table = forked(tmp_path, "report", f"runs={sweep}")
    assert table.returncode == 0, table.stderr
    assert "budget.weight" in table.stdout and (sweep / "pareto.png").exists()


@pytest.mark.slow
@pytest.mark.data
def test_the_papers_model_trains_on_coco_files(tmp_path: Path, shared_data: Path) -> None:
    """The full D8 R50 detector, a few real steps on small pictures; ids come back as they were, and so does the AP."""
    root, few = shared_data / "coco_mini", tmp_path / "val.json"
    content = json.loads((root / "annotations" / "val.json").read_text())
    content["images"] = content["images"][:16]
    chosen = {image["id"] for image in content["images"]}
    content["annotations"] = [item for item in content["annotations"] if item["image_id"] in chosen]
    few.write_text(json.dumps(content))
    layout = [
        f"data.root={root}", "data.train_annotations=${data.root}/annotations/train.json",
        f"data.val_annotations={few}", "data.train_images=${data.root}/images", "data.val_images=${data.root}/images",
    ]  # fmt: skip
    small = ["data.short_edge=96", "data.val_short_edge=96", "data.max_size=128", "data.batch_size=2"]
    rest = ["data.num_workers=0", "trainer.max_steps=2", "trainer.accelerator=cpu", "backbone.weights=none"]
    low = "predictor.postprocess.score_threshold=0.0"
    result = forked(tmp_path, "train", "+experiment=fcos_d8_dyn", *layout, *small, *rest, low, "~callbacks.progress")
    assert result.returncode == 0, result.stderr
    (run,) = tmp_path.glob("outputs/fcos_d8_dyn/*")
    trained = json.loads((run / "result.json").read_text())
    assert trained["step"] == 2
    again = forked(tmp_path, "evaluate", f"ckpt={run}/checkpoints/last.ckpt", "trainer.accelerator=cpu", "impl=dense")
    assert again.returncode == 0, again.stderr
    (folder,) = (tmp_path / "outputs" / "evaluate").iterdir()
    numbers = json.loads((folder / "result.json").read_text())
    assert numbers["val/AP"] == pytest.approx(trained["val/AP"], abs=1e-6)
    truth = COCO(str(few))
    judge = COCOeval(truth, truth.loadRes(str(folder / "detections.json")), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    assert judge.stats[0] == pytest.approx(numbers["val/AP"], abs=1e-6)
    found = json.loads((folder / "detections.json").read_text())
    assert found and {item["category_id"] for item in found} <= set(truth.getCatIds())
    assert {item["image_id"] for item in found} <= set(truth.getImgIds())
