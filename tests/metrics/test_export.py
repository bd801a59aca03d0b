"""COCO json in and out through pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

from dyndet.errors import DataError
from dyndet.metrics.export import original_masks, original_xywh, to_coco_json, write_ground_truth, write_results
from dyndet.structures import Category, Detections, Sample, Target

CATEGORIES = [Category(3, "car"), Category(70, "toilet")]


def target(image_id: int, masks: bool = False) -> Target:
    boxes = torch.tensor([[10.25, 20.5, 30.75, 60.5], [0, 0, 100, 80]])
    pixels = torch.zeros(2, 80, 100, dtype=torch.bool)
    pixels[0, 20:60, 10:30] = True
    pixels[1, ::2] = True
    return Target(
        boxes,
        torch.tensor([1, 0]),
        torch.tensor([False, True]),
        pixels if masks else None,
        image_id=image_id,
        original_size=(80, 100),
        path=f"some/folder/{image_id}.jpg",
    )


class Listed:
    def __init__(self, targets: list[Target]) -> None:
        self.categories, self.targets, self.sizes = CATEGORIES, targets, [(80, 100)] * len(targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Sample:
        return Sample(torch.zeros(3, 80, 100, dtype=torch.uint8), self.targets[index])


def load(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


@pytest.mark.parametrize("masks", [False, True])
def test_ground_truth_reads_back(tmp_path: Path, masks: bool) -> None:
    path = tmp_path / "new" / "truth.json"
    written = write_ground_truth(Listed([target(139, masks), target(7, masks)]), path)
    assert json.loads(path.read_text()) == written
    coco = load(path)
    assert coco.getImgIds() == [139, 7] and coco.getCatIds() == [3, 70]
    image = coco.loadImgs(139)[0]
    assert (image["height"], image["width"], image["file_name"]) == (80, 100, "139.jpg")
    first, second = coco.loadAnns(coco.getAnnIds(imgIds=[7]))
    assert first["bbox"] == [10.25, 20.5, 20.5, 40.0] and first["category_id"] == 70
    assert (first["iscrowd"], second["iscrowd"]) == (0, 1)
    assert first["area"] == (40 * 20 if masks else 20.5 * 40)
    assert ("segmentation" in first) == masks
    if masks:
        expected = target(7, True).masks
        assert expected is not None
        assert np.array_equal(coco.annToMask(second), expected[1].numpy())


@pytest.mark.parametrize("masks", [False, True])
def test_annotated_areas_win(masks: bool) -> None:
    truth = write_ground_truth(Listed([replace(target(7, masks), area=torch.tensor([123.25, 4.5]))]))
    assert [item["area"] for item in truth["annotations"]] == [123.25, 4.5]


def test_results_keep_ids_and_floats(tmp_path: Path) -> None:
    truth = tmp_path / "truth.json"
    write_ground_truth(Listed([target(139), target(7)]), truth)
    masks = torch.rand(1, 80, 100, generator=torch.Generator().manual_seed(0)) > 0.5
    found = Detections(torch.tensor([[1.1, 2.2, 3.3, 4.4]]), torch.tensor([0.3]), torch.tensor([1]), masks)
    empty = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long())
    path = write_results(tmp_path / "deep" / "results.json", to_coco_json([empty, found], [139, 7], CATEGORIES))
    (entry,) = json.loads(path.read_text())
    assert (entry["image_id"], entry["category_id"]) == (7, 70)
    box = found.boxes[0].double()
    assert entry["bbox"] == [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]
    assert entry["score"] == float(found.scores[0])
    with contextlib.redirect_stdout(io.StringIO()):
        coco = load(truth).loadRes(str(path))
    assert np.array_equal(coco.annToMask(coco.anns[1]), masks[0].numpy())


def test_targets_name_their_image() -> None:
    found = Detections(torch.ones(1, 4), torch.ones(1), torch.tensor([0]))
    assert to_coco_json([found], [target(55)], CATEGORIES)[0]["image_id"] == 55
    assert "segmentation" not in to_coco_json([found], [55], CATEGORIES)[0]


def test_repeated_image_ids_are_refused() -> None:
    with pytest.raises(DataError, match=r"image id 7 appears twice .*item 1 some/folder/7.jpg"):
        write_ground_truth(Listed([target(7), target(7)]))


def test_two_decimals_survive_any_resize_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(1, 30000, (1000, 4), generator=generator).double() / 100
    boxes = torch.cat([numbers[:, :2], numbers[:, :2] + numbers[:, 2:]], 1).float()
    empty = torch.zeros(1000)
    for size in [(600, 600), (800, 1333), (123, 77)]:
        scale = torch.tensor([size[1] / 600, size[0] / 600] * 2)
        resized = Target(boxes * scale, empty.long(), empty.bool(), original_size=(600, 600))
        assert torch.equal(original_xywh(resized, size), numbers)


def test_masks_return_to_the_original_size() -> None:
    before = target(1, masks=True)
    assert before.masks is not None
    doubled = before.masks.repeat_interleave(2, 1).repeat_interleave(2, 2)
    padded = torch.nn.functional.pad(doubled, (0, 24, 0, 16))
    after = original_masks(replace(before, masks=padded), (160, 200))
    assert torch.equal(after, before.masks)
