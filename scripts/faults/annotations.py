"""R7: broken annotations, each with its stated outcome: the right value, a box left out and counted, or one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image

from dyndet.data.coco import CocoDataset
from dyndet.data.records import FileDataset
from dyndet.data.usable import refuse_useless
from dyndet.data.yolo import YoloDataset
from dyndet.errors import DataError
from faults import coco_annotations, voc_annotations, yolo_annotations
from faults.annotation_cases import SIZE, Case
from faults.row import Outcome, Row


def _judged(case: Case, read: Callable[[], FileDataset], folder: Path) -> Outcome:
    try:
        dataset = read()
        refuse_useless(dataset, "train")
        targets = [dataset[index].target for index in range(len(dataset))]
    except DataError as error:
        said = str(error)
        fine = case.error is not None and case.error in said and "\n" not in said and str(folder) in said
        return Outcome(case.name, fine, f"refused: {said[:200]}")
    if case.error is not None:
        return Outcome(case.name, False, "read")
    boxes = [[round(value, 3) for value in box] for box in targets[0].boxes.tolist()]
    crowd, dropped = targets[0].crowd.tolist(), dict(dataset.repairs.counts)
    fine = (
        boxes == [[float(value) for value in box] for box in case.boxes]
        and (case.crowd is None or crowd == case.crowd)
        and dropped == case.repairs
        and (case.names is None or [category.name for category in dataset.categories] == case.names)
        and all(bool(torch.isfinite(target.boxes).all()) for target in targets)
    )
    return Outcome(case.name, fine, f"read as {boxes} {crowd} {dropped}")


def _coco(folder: Path) -> Iterator[Outcome]:
    for case in coco_annotations.CASES:
        yield _judged(case, lambda case=case: coco_annotations.read(case, _images(folder)), folder)


def _yolo(folder: Path) -> Iterator[Outcome]:
    for number, case in enumerate(yolo_annotations.CASES):
        place = folder / str(number)
        yield _judged(case, lambda case=case, place=place: yolo_annotations.read(case, _images(place)), place)


def _voc(folder: Path) -> Iterator[Outcome]:
    for number, case in enumerate(voc_annotations.CASES):
        place = folder / str(number)
        yield _judged(case, lambda case=case, place=place: voc_annotations.read(case, _images(place)), place)


def _images(folder: Path) -> Path:
    """A folder with three images in `images`."""
    place = folder / "images"
    if not place.is_dir():
        place.mkdir(parents=True)
        for number in (1, 2, 3):
            Image.new("RGB", (SIZE[1], SIZE[0])).save(place / f"{number}.jpg")
    return folder


def _many(folder: Path) -> Iterator[Outcome]:
    """A million boxes in one image."""
    count = 1_000_000
    _images(folder)
    (folder / "labels").mkdir()
    line = "0 0.5 0.5 0.25 0.25\n"
    (folder / "labels" / "1.txt").write_text(line * count)
    (folder / "data.yaml").write_text("train: images\nnames: [a]\n")
    boxes = len(YoloDataset(folder / "data.yaml")[0].target.boxes)
    yield Outcome("YOLO", boxes == count, f"{boxes} boxes")
    content = coco_annotations.content()
    entry = content["annotations"][0]
    text = json.dumps(entry | {"id": 0})
    annotations = ",".join(text.replace('"id": 0', f'"id": {number}', 1) for number in range(1, count + 1))
    content["annotations"] = []
    (folder / "a.json").write_text(json.dumps(content).replace('"annotations": []', f'"annotations": [{annotations}]'))
    del annotations
    boxes = len(CocoDataset(folder / "a.json", folder / "images")[0].target.boxes)
    yield Outcome("COCO", boxes == count, f"{boxes} boxes")


_PROMISE = "the right value, a box left out and counted, or one line that names the place: as stated for each case"
ROWS = [
    Row("R7.1", "broken annotations in a COCO json", _PROMISE, _coco, 10),
    Row("R7.2", "broken label files and yamls of YOLO sets", _PROMISE, _yolo, 10),
    Row("R7.3", "broken VOC xml", _PROMISE, _voc, 10),
    Row("R7.4", "an image with a million boxes (YOLO, COCO)", "all are read", _many, 60),
]
