"""The command on images, videos and what only looks like them, with a small detector that has learned nothing."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

import dyndet.predict as module
from commands import forked
from dyndet.cli.compose import build, compose_command, compose_experiment
from dyndet.data.video import VideoWriter
from dyndet.errors import UserError
from dyndet.predict import predict

NAMES = ["circle", "square", "triangle", "star"]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = compose_experiment("shapes_dyn", ["head.depth=1", "predictor.postprocess.max_detections=30"])
    detector: Any = build(config.detector)
    nn.init.normal_(detector.predictor.cls.weight, std=0.5)  # so that it finds something
    nn.init.zeros_(detector.predictor.cls.bias)
    content = {
        "dyndet": {
            "config": OmegaConf.to_container(config),
            "categories": [{"id": 10 * k, "name": name} for k, name in enumerate(NAMES, 1)],
        },
        "state_dict": {f"detector.{name}": value for name, value in detector.state_dict().items()},
    }
    file = tmp_path_factory.mktemp("run") / "small.ckpt"
    torch.save(content, file)
    return file


def picture(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    pixels = torch.randint(0, 256, (size[1] // 8, size[0] // 8, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy()).resize(size)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for number in range(2):
        picture(number).save(folder / f"{number}.png")
    picture(2).save(folder / "deep" / "0.png")
    return folder


@pytest.fixture
def run(ckpt: Path, photos: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """The command; returns `detections.json`."""

    def call(*options: str, source: object = photos) -> list[dict[str, Any]]:
        arguments = [f"ckpt={ckpt}", f"source='{source}'", f"out={tmp_path}/out", "device=cpu", *options]
        predict(compose_command("predict", arguments))
        return json.loads((tmp_path / "out" / "detections.json").read_text())

    return call


Run = Callable[..., list[dict[str, Any]]]


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_wishes_reach_the_files(run: Run, photos: Path) -> None:
    wishes = ("score_threshold=0.2", "classes=[square,star]", "max_detections=3")
    (found,) = run("pictures=false", *wishes, source=photos / "0.png")
    assert {row["category_id"] for row in found["detections"]} <= {20, 40} and len(found["detections"]) == 3


def test_all_formats_hold_the_same(run: Run, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run("formats=[json,coco,yolo,csv]")
    assert [item["file"] for item in found] == [str(photos / name) for name in ("0.png", "1.png", "deep/0.png")]
    assert names(tmp_path / "out" / "pictures") == ["0.jpg", "1.jpg", "deep/0.jpg"]
    assert [Path(item["picture"]).is_file() for item in found] == [True] * 3
    counts = [len(item["detections"]) for item in found]
    assert max(counts) == 30
    results = json.loads((tmp_path / "out" / "coco_results.json").read_text())
    assert [sum(item["image_id"] == number for item in results) for number in (1, 2, 3)] == counts
    with (tmp_path / "out" / "detections.csv").open() as file:
        assert len(list(csv.reader(file))) == 1 + sum(counts)
    labels = tmp_path / "out" / "labels"
    assert [len((labels / name).read_text().splitlines()) for name in ("0.txt", "1.txt", "deep/0.txt")] == counts
    assert "3 images and frames, 0 skipped" in capsys.readouterr().out


def test_what_cannot_be_read_is_reported_and_left_out(
    run: Run, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (photos / "1.png").read_bytes()
    (photos / "1.png").write_bytes(whole[: len(whole) // 2])
    (photos / "._0.png").write_bytes(b"\0\5\26\7")
    (photos / "x.jpg").mkdir()
    (photos / "clip.mp4").write_text("no video")
    found = run("pictures=false")
    errors = {Path(item["file"]).name: item["error"] for item in found if "error" in item}
    assert set(errors) == {"1.png", "._0.png", "clip.mp4"} and all("cannot be" in reason for reason in errors.values())
    assert [len(item["detections"]) > 0 for item in found if "error" not in item] == [True, True]
    printed = capsys.readouterr()
    assert "2 images and frames, 3 skipped" in printed.out and not (tmp_path / "out" / "pictures").exists()
    assert [line[:8] for line in printed.err.splitlines() if "cannot be" in line] == ["skipped:"] * 3


def test_exit_codes(ckpt: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "1.png").write_bytes(b"")
    arguments = (f"ckpt={ckpt}", "device=cpu", "out=out", "pictures=false")
    some = forked(tmp_path, "predict", *arguments, f"source={photos}")
    assert some.returncode == 0 and some.stderr.count("skipped:") == 1
    assert "2 images and frames, 1 skipped" in some.stdout
    none = forked(tmp_path, "predict", *arguments, f"source={photos}/1.png")
    assert none.returncode == 3 and "error: source=" in none.stderr and "none of 1 files" in none.stderr
    (entry,) = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert entry["file"] == f"{photos}/1.png" and "cannot be decoded" in entry["error"]
    wrong = forked(tmp_path, "predict", *arguments, "source=https://example.org/a.jpg")
    assert wrong.returncode == 2 and "addresses are not read" in wrong.stderr


def test_an_interruption_keeps_what_was_found(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, calls = module.read_image, []

    def interrupted(path: str) -> torch.Tensor:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(module, "read_image", interrupted)
    with pytest.raises(SystemExit) as ended:
        run("formats=[json,coco]")
    assert ended.value.code == 130
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [item["file"] for item in found] == calls[:2]
    assert {item["image_id"] for item in json.loads((tmp_path / "out" / "coco_results.json").read_text())} == {1, 2}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("classes=[sqare]", r"classes=sqare: .* did you mean square\?"),
        ("classes=[x]", "it knows circle, square, triangle, star"),
        ("formats=[xml]", "formats=xml: choose from json, coco, yolo, csv"),
        ("pictures=gif", "pictures=gif: choose jpg, png or false"),
        ("score_threshold=1.5", "score_threshold=1.5: give a number from 0 to 1"),
        ("score_threshold=high", "give a number from 0 to 1"),
        ("max_detections=0", "max_detections=0: give a whole number from 1"),
        ("frame_step=0.5", "frame_step=0.5: give a whole number"),
    ],
)
def test_wrong_wishes_are_named(run: Run, option: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(option)


def test_pictures_of_one_stem_stay_apart(run: Run, photos: Path, tmp_path: Path) -> None:
    picture(5).save(photos / "0.jpg")
    run("pictures=png", "gates=true")
    pictures = tmp_path / "out" / "pictures"
    assert names(pictures) == ["0_jpg.png", "0_png.png", "1.png", "deep/0.png"]
    with Image.open(pictures / "1.png") as strip:
        assert strip.width > 4 * 320  # gates as well


def test_videos_are_read_and_drawn(run: Run, photos: Path, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with VideoWriter(photos / "deep" / "clip.mp4", Fraction(8)) as writer:
        for number in range(5):
            writer.write(picture(number))
    found = run("frame_step=2", "formats=[json,yolo]")
    frames = [item for item in found if "frame" in item]
    assert len(found) == 6 and [item["frame"] for item in frames] == [0, 2, 4]
    assert [item["seconds"] for item in frames] == [0, 0.25, 0.5]
    assert {item["picture"] for item in frames} == {str(tmp_path / "out" / "pictures" / "deep" / "clip.mp4")}
    with av.open(frames[0]["picture"]) as drawn:
        assert len(list(drawn.decode(video=0))) == 3 and drawn.streams.video[0].average_rate == 4
    assert (tmp_path / "out" / "labels" / "deep" / "clip_000004.txt").is_file()
    assert len(run("max_frames=2", "pictures=false", source=photos / "deep" / "clip.mp4")) == 2


def test_without_pyav_videos_are_left_out(run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (photos / "clip.mp4").touch()
    assert [item["error"] for item in run("pictures=false") if "error" in item] == [
        f"{photos}/clip.mp4: videos need PyAV: pip install 'dyndet[video]'"
    ]
    with pytest.raises(SystemExit) as ended:
        run(source=photos / "clip.mp4")
    assert ended.value.code == 3


def test_nothing_found_is_written_as_nothing(run: Run, tmp_path: Path) -> None:
    found = run("formats=[json,yolo,csv,coco]", "score_threshold=1.0")
    assert [item["detections"] for item in found] == [[]] * 3
    assert json.loads((tmp_path / "out" / "coco_results.json").read_text()) == []
