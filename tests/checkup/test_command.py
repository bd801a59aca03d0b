"""`dyndet doctor` and what `dyndet train` says before it starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from commands import forked
from dyndet.checkup.examination import check_before_training
from dyndet.data.coco import CocoDataset
from dyndet.data.shapes import ShapesDataset
from dyndet.errors import DataError

SIZE = ["data.num_classes=1", "data.size=[64,96]", "data.batch_size=2", "data.num_workers=0"]


def coco(root: Path, name: str, boxes: list[list[float]], count: int = 3) -> CocoDataset:
    """Images of noise with the same boxes in each, as a COCO set."""
    folder = root / name
    folder.mkdir(parents=True)
    images, annotations = [], []
    for image in range(1, count + 1):
        Image.effect_noise((96, 64), 60 + image).convert("RGB").save(folder / f"{image}.png")
        images.append({"id": image, "file_name": f"{image}.png", "height": 64, "width": 96})
        for box in boxes:
            entry = {"id": len(annotations) + 1, "image_id": image, "category_id": 1, "bbox": box}
            annotations.append(entry | {"area": box[2] * box[3], "iscrowd": 0})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}
    (root / f"{name}.json").write_text(json.dumps(content))
    return CocoDataset(root / f"{name}.json", folder)


def test_what_training_says_first(tmp_path: Path) -> None:
    good = coco(tmp_path, "good", [[10, 10, 30, 30]])
    twice = coco(tmp_path, "twice", [[10, 10, 30, 30], [10, 10, 30, 30]])
    assert check_before_training(good, twice) == [
        f"warning: val: 3 pairs of boxes of one class that overlap by 95% or more ({tmp_path}/twice/1.png: cat "
        "[10, 10, 40, 40] again)"
    ]
    (line,) = check_before_training(good, good)
    assert "3 images of val in train as well" in line
    empty = coco(tmp_path, "empty", [])
    with pytest.raises(DataError, match="no box of the train split trains"):
        check_before_training(empty, good)
    assert check_before_training(ShapesDataset(length=2), ShapesDataset(length=2)) == []


def doctor(root: Path, train: str, val: str, *more: str) -> tuple[int, str, list[dict]]:
    layout = [f"data.{split}_annotations={root}/{name}.json" for split, name in (("train", train), ("val", val))]
    layout += [f"data.{split}_images={root}/{name}" for split, name in (("train", train), ("val", val))]
    done = forked(root, "doctor", "+experiment=bccd_static", f"data.root={root}", *layout, *SIZE, "out=found", *more)
    file = root / "found" / "doctor.json"
    return done.returncode, done.stdout + done.stderr, json.loads(file.read_text()) if file.is_file() else []


def test_the_command_tells_what_is_wrong_and_how_badly(tmp_path: Path) -> None:
    coco(tmp_path, "train", [[10, 10, 30, 30]], count=12)
    coco(tmp_path, "val", [[10, 10, 30, 30], [90, 60, 40, 40]])
    (tmp_path / "val" / "2.png").write_bytes(b"no image")
    code, text, findings = doctor(tmp_path, "train", "val")
    assert code == 1
    worst = {finding["check"]: finding for finding in findings}
    assert worst["unreadable images"]["severity"] == "error"
    assert "2.png" in worst["unreadable images"]["places"][0]["where"]
    assert "train  12 images, 12 boxes, 96 x 64 pixels" in text
    assert "1 class: cat" in text
    assert "Traceback" not in text
    (tmp_path / "val" / "2.png").unlink()
    Image.effect_noise((96, 64), 99).convert("RGB").save(tmp_path / "val" / "2.png")
    code, text, _ = doctor(tmp_path, "train", "val", "images=2", "sheet=false")
    assert (code, "0 errors" in text) == (0, True), text


def test_labels_that_cannot_be_read_are_a_finding(tmp_path: Path) -> None:
    coco(tmp_path, "train", [[10, 10, 30, 30]])
    coco(tmp_path, "val", [[10, 10, 30, 30]])
    (tmp_path / "val.json").write_text("[]")
    code, text, findings = doctor(tmp_path, "train", "val")
    assert code == 1
    assert findings[0]["check"] == "labels"
    assert "val.json" in text
    (tmp_path / "train" / "3.png").write_bytes(b"")
    _, _, findings = doctor(tmp_path, "train", "val")
    assert findings[1]["check"] == "unreadable images"
    assert "3.png" in findings[1]["places"][0]["where"]


def test_every_broken_label_file_is_named(tmp_path: Path) -> None:
    labels = {"a": "0 0.5 0.5 0.2", "b": "0 0.5 0.5 0.2 0.2", "c": "7 0.5 0.5 0.2 0.2", "d": "cat"}
    for folder in ("images", "labels"):
        (tmp_path / folder / "train").mkdir(parents=True)
    for stem, text in labels.items():
        Image.effect_noise((96, 64), 60).convert("RGB").save(tmp_path / "images" / "train" / f"{stem}.png")
        (tmp_path / "labels" / "train" / f"{stem}.txt").write_text(text)
    (tmp_path / "data.yaml").write_text("names: [cat]\ntrain: images/train\nval: images/train\n")
    done = forked(tmp_path, "doctor", "+experiment=finetune", "data.root=.", "out=found")
    assert done.returncode == 1
    (finding,) = json.loads((tmp_path / "found" / "doctor.json").read_text())
    assert (finding["text"], finding["count"]) == ("the data cannot be used: 3 faults", 3)
    for place, start in zip(finding["places"], ("a.txt line 1", "c.txt line 1 has class 7", "d.txt"), strict=True):
        assert start in place["where"]
