"""Files of predictions: whole after every entry, and the same boxes in each."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pycocotools.coco import COCO

from dyndet.data.sources import Source
from dyndet.metrics.formats import CocoWriter, CsvWriter, JsonArray, JsonWriter, Prediction, YoloWriter
from dyndet.structures import Category, Detections

CATEGORIES = [Category(7, "cat"), Category(90, "dog, small")]
FOUND = Detections(
    torch.tensor([[10.0, 20, 30, 60], [0.5, 0, 100, 49.25]]), torch.tensor([0.75, 0.5]), torch.tensor([1, 0])
)
NONE = FOUND[torch.zeros(2, dtype=torch.bool)]


def prediction(file: str, found: Detections = FOUND, number: int = 0, **more: Any) -> Prediction:
    return Prediction(file, str(Path(file).with_suffix("")), number, (80, 100), found, 1.5, **more)


def test_an_array_is_whole_after_every_entry(tmp_path: Path) -> None:
    array, items = JsonArray(tmp_path / "a.json"), [{"a": "é\n]"}, [], "x" * 20_000, 4]
    for count in range(len(items) + 1):
        assert json.loads((tmp_path / "a.json").read_text()) == items[:count]
        if count < len(items):
            array.append(items[count])
    array.close()
    JsonArray(tmp_path / "a.json").close()
    assert json.loads((tmp_path / "a.json").read_text()) == []


def test_json_has_an_entry_for_every_file(tmp_path: Path) -> None:
    writer = JsonWriter(tmp_path, CATEGORIES)
    writer.write(prediction("a.jpg", way={"route": "easy"}, picture="p/a.jpg"))
    writer.failed("b.jpg", "truncated")
    writer.write(prediction("c.mp4", NONE, frame={"frame": 3, "seconds": 0.1}))
    first, second, third = json.loads((tmp_path / "detections.json").read_text())
    assert first["detections"][0] == {
        "category_id": 90, "category": "dog, small", "score": 0.75, "box_xyxy": [10, 20, 30, 60]
    }  # fmt: skip
    del first["detections"]
    assert first == {"file": "a.jpg", "picture": "p/a.jpg", "size": [80, 100], "gmacs": 1.5, "route": "easy"}
    assert second == {"file": "b.jpg", "error": "truncated"}
    assert third == {"file": "c.mp4", "frame": 3, "seconds": 0.1, "size": [80, 100], "gmacs": 1.5, "detections": []}


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        (["x/000000000139.jpg", "x/000000000285.jpg"], [139, 285]),
        (["x/139.jpg", "y/139.jpg"], [1, 2]),  # the number is taken
        (["x/139.jpg", "x/a.jpg"], [1, 2]),
    ],
)
def test_coco_results_are_read_by_coco(tmp_path: Path, files: list[str], ids: list[int]) -> None:
    writer = CocoWriter(tmp_path, CATEGORIES, [Source(file, "image", file) for file in files])
    for number, file in enumerate(files):
        writer.write(prediction(file, number=number))
    writer.failed("b.jpg", "truncated")
    truth = COCO()
    truth.dataset = {
        "images": [{"id": number} for number in ids], "annotations": [],
        "categories": [{"id": item.id, "name": item.name} for item in CATEGORIES],
    }  # fmt: skip
    truth.createIndex()
    read = truth.loadRes(str(tmp_path / "coco_results.json"))
    entries = read.loadAnns(read.getAnnIds(imgIds=ids[1:]))
    assert [(item["category_id"], item["bbox"], item["score"]) for item in entries] == [
        (90, [10, 20, 20, 40], 0.75), (7, [0.5, 0, 99.5, 49.25], 0.5)
    ]  # fmt: skip
    assert {item["file_name"] for item in entries} == {files[1]}


def test_yolo_texts_give_the_boxes_back(tmp_path: Path) -> None:
    writer = YoloWriter(tmp_path, CATEGORIES)
    writer.write(prediction("deep/a.jpg"))
    writer.write(prediction("none.jpg", NONE))
    writer.write(prediction("v.mp4", frame={"frame": 12, "seconds": 0.5}))
    assert {path.name for path in (tmp_path / "labels").rglob("*.txt")} == {"a.txt", "none.txt", "v_000012.txt"}
    assert (tmp_path / "labels" / "none.txt").read_text() == ""
    assert (tmp_path / "classes.txt").read_text() == "cat\ndog, small\n"
    rows = [list(map(float, line.split())) for line in (tmp_path / "labels/deep/a.txt").read_text().splitlines()]
    for (label, x, y, w, h, score), box, k, s in zip(rows, FOUND.boxes, (1, 0), (0.75, 0.5), strict=True):
        corners = [(x - w / 2) * 100, (y - h / 2) * 80, (x + w / 2) * 100, (y + h / 2) * 80]
        assert corners == pytest.approx(box.tolist(), abs=1e-3) and (label, score) == (k, s)


def test_tables_are_read_by_csv(tmp_path: Path) -> None:
    writer = CsvWriter(tmp_path, CATEGORIES)
    writer.write(prediction("a, b.jpg", way={"route": "hard"}))
    with (tmp_path / "detections.csv").open(newline="") as file:  # before it is closed
        rows = list(csv.DictReader(file))
    assert [(row["file"], row["category"], row["frame"], row["route"]) for row in rows] == [
        ("a, b.jpg", "dog, small", "", "hard"), ("a, b.jpg", "cat", "", "hard")
    ]  # fmt: skip
    assert [float(rows[1][key]) for key in ("x1", "y1", "x2", "y2", "width", "height", "score", "gmacs")] == [
        0.5, 0, 100, 49.25, 100, 80, 0.5, 1.5
    ]  # fmt: skip
