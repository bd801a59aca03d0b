"""AP of masks against pycocotools on the exported json: ground truth disturbed in a known way, found at other sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from official import official
from torch import Generator, Tensor

from dyndet.data.coco import CocoDataset
from dyndet.data.dataset import DetectionDataset
from dyndet.data.shapes import ShapesDataset
from dyndet.data.transforms import Resize, ResizeShortestEdge
from dyndet.errors import UserError
from dyndet.metrics.average_precision import CocoMetric
from dyndet.metrics.export import original_masks, to_coco_json, write_ground_truth, write_results
from dyndet.structures import Detections, Sample, Target

KINDS = ("bbox", "segm")
FLOAT32 = 6e-8  # the metric's numbers lie in 0..1 and are rounded to float32


def boxes_of(masks: Tensor) -> Tensor:
    """(N, 4) tight boxes; masks that are empty get one of a pixel."""
    boxes = torch.tensor([[0.0, 0, 1, 1]]).repeat(len(masks), 1)
    for box, mask in zip(boxes, masks, strict=True):
        y, x = mask.nonzero().unbind(1)
        if len(x):
            box[:] = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
    return boxes


def disturbed(target: Target, draw: Generator, classes: int) -> Detections:
    """From masks on disk: shifted by up to 8 % of their side, some lost, some of another class, some where nothing is.

    Crowds are found twice; scores tie.
    """
    masks, labels = original_masks(target, target.original_size), target.labels
    kept = [index for index in range(len(masks)) if torch.rand((), generator=draw) < 0.85 or bool(target.crowd[index])]
    kept += [index for index in range(len(masks)) if bool(target.crowd[index])]
    found, guesses = [], []
    for index in kept:
        side = float(masks[index].sum()) ** 0.5
        down, right = (0.16 * side * (torch.rand(2, generator=draw) - 0.5)).round().int().tolist()
        found.append(masks[index].roll((down, right), (0, 1)))
        wrong = torch.rand((), generator=draw) < 0.1
        guesses.append(int(torch.randint(classes, (), generator=draw)) if wrong else int(labels[index]))
    if torch.rand((), generator=draw) < 0.5:
        height, width = target.original_size
        nothing = torch.zeros(height, width, dtype=torch.bool)
        nothing[: height // 3, : width // 5] = True
        found.append(nothing)
        guesses.append(0)
    pixels = torch.stack(found) if found else torch.zeros(0, *target.original_size, dtype=torch.bool)
    scores = (torch.rand(len(found), generator=draw) * 20).round() / 20
    order = scores.argsort(descending=True, stable=True)
    return Detections(boxes_of(pixels)[order], scores[order], torch.tensor(guesses).long()[order], pixels[order])


Transform = Callable[[Sample, Generator], Sample]


def both(
    dataset: DetectionDataset, transform: Transform, crowd: Callable[[int], Tensor] | None = None
) -> tuple[dict[str, float], list[Detections], list[Target]]:
    """Our numbers for disturbed ground truth, seen through a transform; what was found; and the targets on disk."""
    draw = torch.Generator().manual_seed(0)
    metric, detections, targets = CocoMetric(dataset.categories, iou_type=KINDS), [], []
    for index in range(len(dataset)):
        sample = dataset[index]
        if crowd is not None:
            sample.target.crowd = crowd(len(sample.target.labels))
        seen = transform(sample, draw)
        found = disturbed(sample.target, draw, len(dataset.categories))
        metric.update([found], [seen.target], torch.tensor([seen.image.shape[-2:]]))
        detections.append(found)
        targets.append(sample.target)
    return metric.compute(), detections, targets


class Listed:
    def __init__(self, dataset: DetectionDataset, targets: list[Target]) -> None:
        self.categories, self.sizes, self.targets = dataset.categories, dataset.sizes, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Sample:
        return Sample(torch.zeros(3, *self.sizes[index], dtype=torch.uint8), self.targets[index])


@pytest.mark.parametrize("size", [(128, 160), (200, 211)], ids=["as on disk", "enlarged"])
def test_generated_shapes(size: tuple[int, int], tmp_path: Path) -> None:
    dataset = ShapesDataset(length=30, size=(128, 160), num_classes=5, seed=3, load_masks=True)
    values, detections, targets = both(dataset, Resize(size), lambda count: torch.arange(count) % 4 == 3)
    truth = write_ground_truth(Listed(dataset, targets))
    assert any(item["iscrowd"] for item in truth["annotations"])
    file = write_results(tmp_path / "results.json", to_coco_json(detections, targets, dataset.categories))
    results = json.loads(file.read_text())
    for kind, prefix in (("bbox", ""), ("segm", "segm/")):
        expected = {prefix + key: value for key, value in official(truth, results, kind).items()}
        assert {key: values[key] for key in expected} == pytest.approx(expected, abs=FLOAT32, nan_ok=True)
    assert 0.1 < values["segm/AP"] < 0.9 and abs(values["segm/AP"] - values["AP"]) > 0.01
    assert values["segm/APs"] != values["segm/APm"]


def test_the_worse_the_masks_the_lower_their_ap() -> None:
    """Masks without their left half have an overlap of about a half; their boxes are as they were."""
    dataset = ShapesDataset(length=12, seed=5, load_masks=True)
    right, half = (CocoMetric(dataset.categories, iou_type=KINDS, per_class=False) for _ in range(2))
    for sample in (dataset[index] for index in range(len(dataset))):
        target = sample.target
        assert target.masks is not None
        middle = (target.boxes[:, 0] + target.boxes[:, 2]) / 2
        cut = target.masks & (torch.arange(128) > middle[:, None] + 2)[:, None]
        found = Detections(target.boxes, torch.ones(len(target.boxes)), target.labels, target.masks)
        right.update([found], [target])
        half.update([replace(found, masks=cut)], [target])
    assert right.compute()["segm/AP"] == pytest.approx(1)
    values = half.compute()
    assert values["AP"] == pytest.approx(1) and values["segm/AP75"] == 0 and values["segm/AP50"] < 0.5


def _some(images: slice) -> dict[str, float]:
    dataset = ShapesDataset(length=7, size=64, load_masks=True)
    targets = [dataset[index].target for index in range(7)]
    draw = torch.Generator().manual_seed(0)
    detections = [disturbed(target, draw, 3) for target in targets]
    metric = CocoMetric(dataset.categories, iou_type=KINDS)
    metric.update(detections[images], targets[images])
    return metric.compute()


def _process(rank: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results[rank] = _some(slice(0, 2) if rank == 0 else slice(2, None))
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(_process, (str(tmp_path / "store"), results), nprocs=2, start_method="fork")  # type: ignore[attr-defined]
        alone = _some(slice(None))
        assert results[0] == pytest.approx(alone, nan_ok=True) and results[1] == pytest.approx(alone, nan_ok=True)
    assert alone["segm/AP"] > 0.1


def test_targets_without_masks_are_named_with_the_key_that_loads_them() -> None:
    dataset = ShapesDataset(length=1)
    target = dataset[0].target
    count = len(target.boxes)
    found = Detections(target.boxes, torch.ones(count), target.labels, torch.ones(count, 128, 128).bool())
    with pytest.raises(UserError, match=r"image 0 has no masks.*data\.masks=true"):
        CocoMetric(dataset.categories, iou_type=KINDS).update([found], [target])


@pytest.mark.data
@pytest.mark.parametrize(("split", "short"), [("val", 800), ("train", 333)], ids=["enlarged", "made smaller"])
def test_coco(shared_data: Path, split: str, short: int) -> None:
    """The official annotations, polygons and crowds, whatever size the detector sees."""
    folder = shared_data / "coco_mini"
    file = folder / "annotations" / f"{split}.json"
    dataset = CocoDataset(file, folder / "images", load_masks=True)
    values, detections, targets = both(dataset, ResizeShortestEdge(short, 1333))
    results = to_coco_json(detections, targets, dataset.categories)
    expected = {f"segm/{key}": value for key, value in official(json.loads(file.read_text()), results, "segm").items()}
    assert {key: values[key] for key in expected} == pytest.approx(expected, abs=FLOAT32, nan_ok=True)
    assert 0.2 < values["segm/AP"] < 0.95
