"""AP of what readers read is that of pycocotools on the user's own file, however odd its boxes are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from official import official
from PIL import Image
from pycocotools import mask as rle

from dyndet.data.coco import CocoDataset
from dyndet.data.datamodule import DetectionDataModule
from dyndet.data.records import FileDataset
from dyndet.data.transforms import RandomHorizontalFlip, ResizeShortestEdge
from dyndet.data.voc import VocDataset
from dyndet.data.yolo import YoloDataset
from dyndet.metrics.average_precision import CocoMetric
from dyndet.metrics.export import to_coco_json, write_ground_truth
from dyndet.structures import Category, Detections

HEIGHT, WIDTH, IMAGES = 120, 180, 10
CATEGORIES = [Category(3, "ant"), Category(7, "bee")]


def odd_boxes(draw: np.random.Generator) -> list[list[float]]:
    """xywh with all digits of float64: inside, partly outside (amodal), outside, without area, inverted, tiny."""
    boxes = []
    for _ in range(draw.integers(2, 9)):
        x, y = draw.uniform(-0.2, 1, 2) * (WIDTH, HEIGHT)
        w, h = draw.uniform(0.05, 0.9, 2) * (WIDTH, HEIGHT)
        kind = draw.integers(10)
        w = {0: 0.0, 1: -w, 2: w / 1000}.get(int(kind), w)
        boxes.append([float(x), float(y), float(w), float(h) if kind != 3 else 0.0])
    return [[10.5, 10.25, 50.125, 40.0], *boxes]


def polygon(box: list[float]) -> list[list[float]]:
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x + 0.3 * w, y + h]]


def coco_file(folder: Path, seed: int, *, masks: bool = False) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    images, annotations = [], []
    for number in range(IMAGES):
        Image.fromarray(draw.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        images.append({"id": 100 - number, "file_name": f"{number}.png", "height": HEIGHT, "width": WIDTH})
        for box in odd_boxes(draw):
            entry = {
                "id": len(annotations) + 1,
                "image_id": 100 - number,
                "category_id": int(draw.choice([3, 7])),
                "bbox": box,
                "iscrowd": int(draw.random() < 0.1),
                "area": float(draw.choice([0.0, 1023.9, abs(box[2] * box[3]), 1e11], p=[0.1, 0.1, 0.75, 0.05])),
            }
            annotations.append(entry | ({"segmentation": polygon(box)} if masks else {}))
    categories = [{"id": category.id, "name": category.name} for category in CATEGORIES]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "set.json").write_text(json.dumps(truth))
    return truth


def found_in(truth: dict[str, Any], image_id: int, seed: int, *, masks: bool = False) -> Detections:
    """About the annotated boxes, some exactly, some twice, some of the wrong class; scores tie."""
    draw = np.random.default_rng((seed, image_id))
    boxes, labels = [], []
    for entry in truth["annotations"]:
        if entry["image_id"] == image_id:
            for _ in range(draw.integers(0, 3)):
                x, y, w, h = entry["bbox"]
                box = np.array([x, y, x + w, y + h]) + draw.normal(0, 4, 4) * draw.integers(2)
                boxes.append([*box[:2], *np.maximum(box[2:], box[:2] + 1)])
                labels.append({3: 0, 7: 1}[entry["category_id"]] ^ int(draw.random() < 0.1))
    scores = np.sort(draw.integers(0, 20, len(boxes)) / 20)[::-1].copy()
    pixels = None
    if masks:
        parts = [rle.frPyObjects(polygon([x, y, p - x, q - y]), HEIGHT, WIDTH) for x, y, p, q in boxes]
        pixels = np.zeros((len(boxes), HEIGHT, WIDTH), bool)
        for index, part in enumerate(parts):
            pixels[index] = rle.decode(part)[..., 0]
    return Detections(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(scores, dtype=torch.float32),
        torch.tensor(labels, dtype=torch.int64),
        None if pixels is None else torch.from_numpy(pixels),
    )


def agrees(dataset: FileDataset, truth: dict[str, Any], seed: int, *, masks: bool = False) -> dict[str, float]:
    """Asserts that the metric, fed by the loader of evaluation, says what pycocotools says on the truth."""
    module = DetectionDataModule(
        train=dataset, val=dataset, batch_size=3, val_transform=[ResizeShortestEdge(77, 1000)], num_workers=0
    )
    module.setup("validate")
    metric = CocoMetric(dataset.categories, iou_type=("bbox", "segm") if masks else "bbox")
    results = []
    for batch in module.val_dataloader():
        found = [found_in(truth, target.image_id, seed, masks=masks) for target in batch.targets]
        metric.update(found, batch.targets, batch.images.sizes)
        results += to_coco_json(found, batch.targets, CATEGORIES)
    values = metric.compute()
    for kind, prefix in (("bbox", ""), ("segm", "segm/"))[: 1 + masks]:
        for key, value in official(truth, results, kind).items():
            # torchmetrics hands out float32.
            assert values[prefix + key] == pytest.approx(float(np.float32(value)), abs=1e-9, nan_ok=True), prefix + key
    assert 0.02 < values["AP"] < 0.98
    return values


@pytest.mark.parametrize("seed", range(5))
def test_coco_boxes_count_as_annotated(tmp_path: Path, seed: int) -> None:
    truth = coco_file(tmp_path, seed)
    dataset = CocoDataset(tmp_path / "set.json", tmp_path)
    values = agrees(dataset, truth, seed)
    assert dataset.repairs.dropped > 0 and dataset.repairs.counts["clipped"] > 0  # training is spared them
    # The exported truth is the file's.
    exported = write_ground_truth(dataset)
    for ours, theirs in zip(exported["annotations"], _in_order(truth), strict=True):
        for key in ("image_id", "category_id", "bbox", "iscrowd", "area"):
            assert ours[key] == theirs[key]
    assert not math.isnan(values["APl"])


def _in_order(truth: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for image in truth["images"] for entry in truth["annotations"] if entry["image_id"] == image["id"]]


@pytest.mark.parametrize("seed", range(3))
def test_coco_masks_count_as_annotated(tmp_path: Path, seed: int) -> None:
    truth = coco_file(tmp_path, seed, masks=True)
    agrees(CocoDataset(tmp_path / "set.json", tmp_path, load_masks=True), truth, seed, masks=True)


def test_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    truth = coco_file(tmp_path, 0)
    broken = json.loads(json.dumps(truth))
    broken["annotations"].append(truth["annotations"][0] | {"id": 999, "bbox": [1, 1, math.nan, 5]})
    (tmp_path / "set.json").write_text(json.dumps(broken))
    dataset = CocoDataset(tmp_path / "set.json", tmp_path)
    assert dataset.repairs.counts["non-finite"] == 1
    agrees(dataset, truth, 0)


def relative(truth: dict[str, Any]) -> dict[str, Any]:
    """The same boxes as image files in name order have them, ids from 1, areas of the boxes."""
    for image in truth["images"]:
        image["id"] = 101 - image["id"]
    for index, entry in enumerate(truth["annotations"]):
        entry.update(image_id=101 - entry["image_id"], area=abs(entry["bbox"][2] * entry["bbox"][3]), iscrowd=0)
        entry["id"] = index + 1
    return truth


@pytest.mark.parametrize("seed", range(2))
def test_yolo_boxes_count_as_annotated(tmp_path: Path, seed: int) -> None:
    truth = relative(coco_file(tmp_path, seed))
    for image in truth["images"]:
        lines = []
        for entry in truth["annotations"]:
            if entry["image_id"] == image["id"]:
                x, y, w, h = entry["bbox"]
                values = ((x + w / 2) / WIDTH, (y + h / 2) / HEIGHT, w / WIDTH, h / HEIGHT)
                lines.append(" ".join(map(repr, [{3: 0, 7: 1}[entry["category_id"]], *map(float, values)])))
        (tmp_path / image["file_name"]).with_suffix(".txt").write_text("\n".join(lines))
    (tmp_path / "data.yaml").write_text("val: .\nnames: [ant, bee]\n")
    agrees(YoloDataset(tmp_path / "data.yaml", split="val"), truth, seed)


@pytest.mark.parametrize("seed", range(2))
def test_voc_boxes_count_as_annotated(tmp_path: Path, seed: int) -> None:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    truth = relative(coco_file(tmp_path / "JPEGImages", seed))
    for image in truth["images"]:
        objects = []
        for entry in truth["annotations"]:
            if entry["image_id"] == image["id"]:
                entry["iscrowd"] = int(entry["id"] % 7 == 0)
                x, y, w, h = entry["bbox"]
                name = {3: "ant", 7: "bee"}[entry["category_id"]]
                objects.append(
                    f"<object><name>{name}</name><difficult>{entry['iscrowd']}</difficult><bndbox><xmin>{x!r}</xmin>"
                    f"<ymin>{y!r}</ymin><xmax>{x + w!r}</xmax><ymax>{y + h!r}</ymax></bndbox></object>"
                )
        stem = Path(image["file_name"]).stem
        (tmp_path / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{''.join(objects)}</annotation>")
    stems = "\n".join(Path(image["file_name"]).stem for image in truth["images"])
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text(stems)
    agrees(VocDataset(tmp_path, split="val"), truth, seed)


def test_truth_goes_with_the_image_or_not_at_all(tmp_path: Path) -> None:
    coco_file(tmp_path, 0)
    sample = CocoDataset(tmp_path / "set.json", tmp_path)[0]
    draw = torch.Generator()
    assert ResizeShortestEdge(50, 90)(sample, draw).target.truth is sample.target.truth is not None
    assert RandomHorizontalFlip(1.0)(sample, draw).target.truth is None  # its boxes are elsewhere now
    assert sample.target[torch.tensor([0])].truth is None
    assert sample.target.to("cpu").truth is sample.target.truth
