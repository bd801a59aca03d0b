"""CocoMetric against pycocotools run on the exported json."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from official import official
from torch import Tensor

from dyndet.errors import UserError
from dyndet.metrics.average_precision import CocoMetric
from dyndet.metrics.export import to_coco_json, write_ground_truth
from dyndet.structures import Category, Detections, Sample, Target

CATEGORIES = [Category(1, "person"), Category(17, "cat"), Category(90, "toothbrush")]


class Listed:
    """A dataset of given samples."""

    def __init__(self, targets: list[Target]) -> None:
        self.categories = CATEGORIES
        self.targets = targets
        self.sizes = [target.original_size for target in targets]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Sample:
        return Sample(torch.zeros(3, *self.sizes[index], dtype=torch.uint8), self.targets[index])


def boxes(count: int, generator: torch.Generator) -> Tensor:
    """Annotated like COCO: two decimals of x, y, w, h, of all three area ranges."""
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 150
    size = 4 + torch.rand(count, 2, generator=generator, dtype=torch.float64) ** 2 * 140
    corner, size = corner.round(decimals=2), size.round(decimals=2)
    return torch.cat([corner, corner + size], 1).float()


def scene(seed: int, images: int = 12) -> tuple[list[Detections], list[Target]]:
    """Images with crowds, without ground truth, without detections; scores often tie across images."""
    generator = torch.Generator().manual_seed(seed)
    detections, targets = [], []
    for index in range(images):
        count = 0 if index == 3 else int(torch.randint(1, 9, (1,), generator=generator))
        truth, labels = boxes(count, generator), torch.randint(0, 3, (count,), generator=generator)
        crowd = torch.rand(count, generator=generator) < 0.15
        targets.append(Target(truth, labels, crowd, image_id=1000 - 7 * index, original_size=(320, 300)))
        extra = 0 if index == 5 else 6
        found = torch.cat([truth + torch.randn(truth.shape, generator=generator) * 2, boxes(extra, generator)])
        found[:, 2:] = torch.maximum(found[:, 2:], found[:, :2] + 1)
        guesses = torch.cat([labels, torch.randint(0, 3, (extra,), generator=generator)])
        if index == 5:
            found, guesses = found[:0], guesses[:0]
        scores = (torch.rand(len(found), generator=generator) * 20).round() / 20
        order = scores.argsort(descending=True, stable=True)
        detections.append(Detections(found[order], scores[order], guesses[order]))
    return detections, targets


def resized(target: Target, size: tuple[int, int]) -> Target:
    scale = torch.tensor([size[1] / target.original_size[1], size[0] / target.original_size[0]] * 2)
    return replace(target, boxes=target.boxes * scale)


@pytest.mark.parametrize("seed", range(4))
def test_equals_pycocotools_on_the_exported_json(seed: int) -> None:
    detections, targets = scene(seed)
    metric = CocoMetric(CATEGORIES)
    for start in range(0, len(targets), 5):
        metric.update(detections[start : start + 5], targets[start : start + 5])
    expected = official(write_ground_truth(Listed(targets)), to_coco_json(detections, targets, CATEGORIES))
    assert metric.compute() == pytest.approx(expected, abs=1e-6, nan_ok=True)
    assert 0.05 < expected["AP"] < 0.95


def test_resized_targets_give_the_same_values() -> None:
    # Boxes that meet IoU 0.5 and 0.75 exactly: any residue of the resizing in float32 would move them across.
    truth = torch.tensor([[10, 10, 50, 30.0], [100, 50, 140.0, 90.0], [3, 7, 36, 40]])
    found = torch.tensor([[10, 10, 50, 20.0], [100, 50, 140.0, 80.0], [3, 7, 36, 40]])
    target = Target(truth, torch.zeros(3).long(), torch.zeros(3).bool(), image_id=5, original_size=(427, 640))
    detections = [Detections(found, torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3).long())]
    expected = official(write_ground_truth(Listed([target])), to_coco_json(detections, [target], CATEGORIES))
    for size in [(427, 640), (800, 1199), (333, 500), (213, 320)]:
        metric = CocoMetric(CATEGORIES)
        metric.update(detections, [resized(target, size)], torch.tensor([size]))
        assert metric.compute() == pytest.approx(expected, abs=1e-6, nan_ok=True)
    assert expected["AP50"] == pytest.approx(1.0)


def test_masks_equal_pycocotools() -> None:
    generator = torch.Generator().manual_seed(0)
    detections, targets = [], []
    for index in range(4):
        truth = torch.rand(3, 40, 50, generator=generator) < torch.linspace(0.1, 0.9, 50)
        noise = torch.rand(3, 40, 50, generator=generator) < 0.1 * (index + 1)
        box = torch.tensor([[0, 0, 50, 40.0]] * 3)
        labels = torch.tensor([0, 1, 2])
        crowd = torch.tensor([False, False, index == 2])
        targets.append(Target(box, labels, crowd, truth, image_id=index, original_size=(40, 50)))
        detections.append(Detections(box, torch.rand(3, generator=generator), labels, truth ^ noise))
    metric = CocoMetric(CATEGORIES, iou_type=("bbox", "segm"))
    metric.update(detections, targets)
    values = metric.compute()
    truth, results = write_ground_truth(Listed(targets)), to_coco_json(detections, targets, CATEGORIES)
    for kind, prefix in (("segm", "segm/"), ("bbox", "")):
        expected = {prefix + key: value for key, value in official(truth, results, kind).items()}
        assert {key: values[key] for key in expected} == pytest.approx(expected, abs=1e-6, nan_ok=True)
    assert 0.1 < values["segm/AP"] < values["AP"]


def test_annotated_area_decides_the_size_range() -> None:
    target = Target(
        torch.tensor([[0, 0, 100, 100.0]]), torch.tensor([0]), torch.tensor([False]), original_size=(120, 120)
    )
    found = [Detections(target.boxes, torch.ones(1), torch.tensor([0]))]
    by_box, by_area = CocoMetric(CATEGORIES), CocoMetric(CATEGORIES)
    by_box.update(found, [target])
    by_area.update(found, [replace(target, area=torch.tensor([500.0]))])
    assert by_box.compute()["APl"] == pytest.approx(1) and math.isnan(by_box.compute()["APs"])
    assert by_area.compute()["APs"] == pytest.approx(1) and math.isnan(by_area.compute()["APl"])


def nothing(count: int = 0) -> tuple[Detections, Target]:
    target = Target(
        torch.rand(count, 4) + torch.tensor([0, 0, 5, 5]), torch.zeros(count).long(), torch.zeros(count).bool()
    )
    return Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long()), target


@pytest.mark.parametrize("iou_type", ["bbox", ("bbox", "segm")])
def test_nothing_found_is_zero_and_nothing_to_find_is_nan(iou_type: Any) -> None:
    metric = CocoMetric(CATEGORIES, iou_type=iou_type)
    found, empty = nothing()
    empty = replace(empty, masks=torch.zeros(0, 20, 20).bool())
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert all(math.isnan(value) for value in metric.compute().values())
    metric.reset()
    metric.update([found], [empty])
    values = metric.compute()
    assert len(values) == (10 if iou_type == "bbox" else 20)
    assert all(math.isnan(value) for value in values.values())
    found, target = nothing(2)
    metric.update([found], [replace(target, masks=torch.ones(2, 20, 20).bool())])
    assert metric.compute()["AP"] == 0 and metric.compute()["AP/person"] == 0
    assert math.isnan(metric.compute()["AP/cat"])


def test_false_positives_on_images_without_ground_truth_count() -> None:
    _, empty = nothing()
    target = Target(torch.tensor([[0, 0, 9, 9.0]]), torch.tensor([0]), torch.tensor([False]))
    right = Detections(target.boxes, torch.tensor([0.5]), torch.tensor([0]))
    wrong = Detections(target.boxes, torch.tensor([0.9]), torch.tensor([0]))
    metric = CocoMetric(CATEGORIES)
    metric.update([right, wrong], [target, empty])
    assert metric.compute()["AP"] == pytest.approx(0.5)


def test_segm_without_masks_is_a_user_error() -> None:
    with pytest.raises(UserError, match="iou_type"):
        CocoMetric(CATEGORIES, iou_type=("segm",))
    target = Target(torch.ones(1, 4), torch.zeros(1).long(), torch.zeros(1).bool(), image_id=42)
    with pytest.raises(UserError, match="image 42"):
        CocoMetric(CATEGORIES, iou_type=("bbox", "segm")).update([nothing()[0]], [target])


def _process(rank: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    detections, targets = scene(1)
    mine = slice(0, 3) if rank == 0 else slice(3, None)  # unequal on purpose
    metric = CocoMetric(CATEGORIES)
    metric.update(detections[mine], targets[mine])
    first = metric.compute()
    assert len(metric.image_ids) == (3 if rank == 0 else 9), "the state of this process must come back"
    results[rank] = first
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    metric = CocoMetric(CATEGORIES)
    metric.update(*scene(1))
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(_process, (str(tmp_path / "store"), results), nprocs=2, start_method="fork")  # type: ignore[attr-defined]
        assert results[0] == results[1] == metric.compute()


@pytest.mark.data
@pytest.mark.parametrize("split", ["train", "val"])
def test_real_annotations(shared_data: Path, split: str) -> None:
    truth = json.loads((shared_data / "coco_mini" / "annotations" / f"{split}.json").read_text())
    categories = [Category(item["id"], item["name"]) for item in truth["categories"]]
    label = {category.id: index for index, category in enumerate(categories)}
    generator = torch.Generator().manual_seed(0)
    metric, everything, targets = CocoMetric(categories), [], []
    for image in truth["images"]:
        annotations = [item for item in truth["annotations"] if item["image_id"] == image["id"]]
        xywh = torch.tensor([item["bbox"] for item in annotations], dtype=torch.float64).reshape(-1, 4)
        labels = torch.tensor([label[item["category_id"]] for item in annotations]).long()
        target = Target(
            torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1).float(),
            labels,
            torch.tensor([item["iscrowd"] for item in annotations]).bool(),
            area=torch.tensor([item["area"] for item in annotations], dtype=torch.float64),
            image_id=image["id"],
            original_size=(image["height"], image["width"]),
        )
        noise = torch.randn(target.boxes.shape, generator=generator) * xywh.mean(1, keepdim=True).float() * 0.03
        found = target.boxes + noise
        detections = Detections(found, torch.rand(len(found), generator=generator), labels)
        small = (round(image["height"] * 0.61), round(image["width"] * 0.61))
        metric.update([detections], [resized(target, small)], torch.tensor([small]))
        everything.append(detections)
        targets.append(target)
    expected = official(truth, to_coco_json(everything, targets, categories))
    assert metric.compute() == pytest.approx(expected, abs=1e-6, nan_ok=True)
    assert 0.1 < expected["AP"] < 0.9
