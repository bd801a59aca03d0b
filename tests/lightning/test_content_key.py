"""Names of what was computed from a data set: every change of its content is another name."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dyndet.data.datamodule import Subset
from dyndet.data.records import FileDataset, Record
from dyndet.data.shapes import ShapesDataset
from dyndet.lightning.content_key import content_key
from dyndet.structures import Category, Sample

CATEGORIES = [Category(1, "a"), Category(2, "b")]


def records(folder: Path) -> list[Record]:
    for index in range(3):
        if not (folder / f"{index}.png").exists():
            Image.new("RGB", (32, 24), (index * 50, 0, 0)).save(folder / f"{index}.png")
    return [Record.of(folder / f"{index}.png", index, (24, 32), [[1, 2, 20, 20.5]], [index % 2]) for index in range(3)]


def changed(index: int, **values: object) -> Callable[[list[Record]], list[Record]]:
    def change(items: list[Record]) -> list[Record]:
        items[index] = replace(items[index], **values)  # type: ignore[arg-type]
        return items

    return change


@pytest.mark.parametrize(
    "change",
    [
        changed(1, labels=np.array([0])),
        changed(1, boxes=np.array([[1, 2, 20, 20.0]])),
        changed(1, crowd=np.array([True])),
        changed(1, areas=np.array([5], np.float32)),
        changed(1, image_id=9),
        lambda items: items[:2],
        lambda items: items[::-1],
    ],
)
def test_every_change_of_annotations_or_the_list_is_another_key(
    tmp_path: Path, change: Callable[[list[Record]], list[Record]]
) -> None:
    key = content_key(FileDataset(records(tmp_path), CATEGORIES))
    assert content_key(FileDataset(records(tmp_path), CATEGORIES)) == key
    assert content_key(FileDataset(change(records(tmp_path)), CATEGORIES)) != key


def test_another_file_or_another_name_is_another_key(tmp_path: Path) -> None:
    items = records(tmp_path)
    key = content_key(FileDataset(items, CATEGORIES))
    assert content_key(FileDataset(items, CATEGORIES[::-1])) != key
    assert content_key(Subset(FileDataset(items, CATEGORIES), [0, 1, 2])) != key
    one, two = (content_key(Subset(FileDataset(items, CATEGORIES), some)) for some in ([0, 1], [0, 2]))
    assert one != two
    os.utime(tmp_path / "2.png", ns=(0, 1))
    assert content_key(FileDataset(items, CATEGORIES)) != key


def test_generated_images_count_by_their_arguments_and_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ShapesDataset, "__getitem__")
    keys = [
        content_key(ShapesDataset(length=4, size=32, seed=seed, num_classes=n)) for seed, n in ((0, 3), (1, 3), (0, 2))
    ]
    assert len(set(keys)) == 3 and content_key(ShapesDataset(length=4, size=32)) == keys[0]


class Own:
    """A data set that is a sequence of samples and no more."""

    def __init__(self, label: int, pixel: int) -> None:
        self.categories, self.sizes = CATEGORIES, [(32, 32)]
        self.label, self.pixel = label, pixel

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Sample:
        sample = ShapesDataset(length=1, size=32)[0]
        image = sample.image.clone()
        image[0, 0, 0] = self.pixel
        return Sample(image, replace(sample.target, labels=torch.full_like(sample.target.labels, self.label)))


def test_any_other_data_set_counts_by_its_samples() -> None:
    keys = [content_key(Own(*values)) for values in ((0, 0), (1, 0), (0, 1), (0, 0))]
    assert keys[0] == keys[3] and len(set(keys)) == 3
