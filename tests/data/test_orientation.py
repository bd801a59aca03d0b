"""Annotations of photos that carry an EXIF orientation, for upright images and for stored pixels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dyndet.data.coco import CocoDataset
from dyndet.data.records import FileDataset
from dyndet.data.voc import VocDataset
from dyndet.data.yolo import YoloDataset
from dyndet.errors import DataError

OBJECT = (10, 8, 40, 32)
"""Where the red object is in an upright image."""

STORED = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


def photo(path: Path, orientation: int, size: tuple[int, int] = (64, 96)) -> None:
    """A red object on grey, (H, W) as seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*size, 3), 100, np.uint8)
    pixels[OBJECT[1] : OBJECT[3], OBJECT[0] : OBJECT[2]] = (220, 30, 30)
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = orientation
    (image.transpose(STORED[orientation]) if orientation in STORED else image).save(path, quality=98, exif=exif)


def in_stored(orientation: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The object in stored pixels, for (H, W) as seen."""
    x1, y1, x2, y2 = OBJECT
    height, width = size
    turned = {3: (width - x2, height - y2, width - x1, height - y1), 6: (y1, width - x2, y2, width - x1)}
    return turned.get(orientation, OBJECT if orientation == 1 else (height - y2, x1, height - y1, x2))


def coco(root: Path, orientations: list[int], *, stored: bool, size: tuple[int, int] = (64, 96)) -> CocoDataset:
    images, annotations = [], []
    for number, orientation in enumerate(orientations, start=1):
        photo(root / f"{number}.jpg", orientation, size)
        x1, y1, x2, y2 = in_stored(orientation, size) if stored else OBJECT
        height, width = size[::-1] if stored and orientation >= 5 else size
        images.append({"id": number, "file_name": f"{number}.jpg", "height": height, "width": width})
        part = [[x1, y1, x2, y1, x2, y2, x1, y2]]
        box = [x1, y1, x2 - x1, y2 - y1]
        annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": box, "segmentation": part})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "red"}]}
    (root / "set.json").write_text(json.dumps(content))
    return CocoDataset(root / "set.json", root, load_masks=True)


def on_the_object(dataset: FileDataset) -> list[bool]:
    found = []
    for index in range(len(dataset)):
        sample = dataset[index]
        x1, y1, x2, y2 = sample.target.boxes[0].round().int().tolist()
        colour = sample.image[:, y1:y2, x1:x2].float().mean((1, 2))
        right = colour[0] > 200 and colour[1] < 60
        if sample.target.masks is not None:
            assert sample.target.masks.shape[1:] == sample.image.shape[1:]
            right &= bool(sample.image[0][sample.target.masks[0]].float().mean() > 200)
        assert (sample.image.shape[1], sample.image.shape[2]) == dataset.sizes[index]
        found.append(bool(right))
    return found


@pytest.mark.parametrize("stored", [False, True], ids=["upright", "stored"])
def test_coco_sizes_tell(tmp_path: Path, caplog: pytest.LogCaptureFixture, stored: bool) -> None:
    dataset = coco(tmp_path, [1, 6, 8, 3, 6], stored=stored)
    assert all(on_the_object(dataset))  # the one turned by 180 degrees is like the others
    messages = [message for message in caplog.messages if "EXIF" in message]
    assert ("3 images are annotated for their stored pixels" in messages[0]) == stored
    assert "2.jpg" in messages[0] or not stored
    assert f"1 images have an EXIF orientation, {''}" in messages[-1] and "4.jpg" in messages[-1]
    assert ("unturned" if stored else "upright") in messages[-1]
    assert len(messages) == 1 + stored


@pytest.mark.parametrize("size", [(64, 96), (96, 96)])
def test_where_no_size_tells_images_are_upright_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, size: tuple[int, int]
) -> None:
    orientations = [1, 3, 3] if size == (64, 96) else [1, 6, 8]
    assert all(on_the_object(coco(tmp_path, orientations, stored=False, size=size)))
    (message,) = caplog.messages
    assert "2 images have an EXIF orientation" in message and "2.jpg" in message and "upright" in message


def test_images_without_orientation_say_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert all(on_the_object(coco(tmp_path, [1, 1], stored=False)))
    assert not caplog.messages


def test_other_sizes_are_refused_and_the_orientation_named(tmp_path: Path) -> None:
    coco(tmp_path, [6], stored=False)
    content = json.loads((tmp_path / "set.json").read_text())
    content["images"][0]["width"] = 100
    (tmp_path / "set.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"1\.jpg has 64 x 96 .* for 64 x 100, nor without its EXIF orientation 6"):
        CocoDataset(tmp_path / "set.json", tmp_path)


def test_yolo_is_relative_to_the_upright_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, orientation in enumerate((6, 3, 8, 1)):
        photo(tmp_path / "images" / f"{number}.jpg", orientation)
        (tmp_path / "labels").mkdir(exist_ok=True)
        (tmp_path / "labels" / f"{number}.txt").write_text(f"0 {25 / 96} {20 / 64} {30 / 96} {24 / 64}")
    (tmp_path / "data.yaml").write_text("train: images\nnames: [red]\n")
    dataset = YoloDataset(tmp_path / "data.yaml")
    assert all(on_the_object(dataset))
    assert "3 images have an EXIF orientation" in caplog.text


@pytest.mark.parametrize("stored", [False, True], ids=["upright", "stored"])
def test_voc_sizes_tell(tmp_path: Path, stored: bool) -> None:
    stems = []
    for number, orientation in enumerate((6, 8, 3, 1)):
        photo(tmp_path / "JPEGImages" / f"{number}.jpg", orientation)
        height, width = (96, 64) if stored and orientation >= 5 else (64, 96)
        x1, y1, x2, y2 = in_stored(orientation, (64, 96)) if stored else OBJECT
        box = f"<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
        (tmp_path / "Annotations").mkdir(exist_ok=True)
        (tmp_path / "Annotations" / f"{number}.xml").write_text(
            f"<annotation><size><width>{width}</width><height>{height}</height></size>"
            f"<object><name>red</name><bndbox>{box}</bndbox></object></annotation>"
        )
        stems.append(str(number))
    listing = tmp_path / "ImageSets" / "Main" / "train.txt"
    listing.parent.mkdir(parents=True)
    listing.write_text("\n".join(stems))
    assert all(on_the_object(VocDataset(tmp_path)))


def test_headers_of_a_large_set_are_sampled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dyndet.data.records.LOOKED_AT", 3)
    dataset = coco(tmp_path, [1, 6, 1, 6, 1, 6], stored=True)  # images 0, 2 and 4 are looked at
    assert not caplog.messages
    assert all(on_the_object(dataset))  # each by its own size
    assert torch.equal(torch.tensor(dataset.sizes), torch.tensor([(64, 96), (96, 64)] * 3))
