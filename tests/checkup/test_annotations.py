"""Checks of annotations on sets in which each fault was put once."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from dyndet.checkup.annotations import SAME, check_annotations
from dyndet.checkup.finding import Finding
from dyndet.checkup.split import Split, read_splits
from dyndet.data.datamodule import Subset
from dyndet.data.records import FileDataset, Record, Repairs
from dyndet.data.shapes import ShapesDataset
from dyndet.structures import Category

CATEGORIES = [Category(1, "cat"), Category(2, "dog"), Category(3, "cow")]
SIZE = (100, 200)


class Plain:
    """Records without files."""

    def __init__(self, *rows: tuple[list[list[float]], list[int]], crowd: bool = False) -> None:
        self.categories = CATEGORIES
        self.sizes = [SIZE] * len(rows)
        self.records = [
            Record.of(Path(f"{index}.jpg"), index, SIZE, boxes, labels, [crowd] * len(labels))
            for index, (boxes, labels) in enumerate(rows)
        ]

    def split(self, name: str = "train", prefix: str = "", repairs: Repairs | None = None) -> Split:
        dataset = object.__new__(FileDataset)
        dataset.records, dataset.categories, dataset.sizes = self.records, self.categories, self.sizes
        dataset.repairs = repairs or Repairs()
        dataset.upright = True
        split = Split.of(name, dataset)
        split.paths[:] = [prefix + path for path in split.paths]
        return split


GOOD = ([[10.0, 10, 50, 60], [60, 10, 90, 80], [100, 20, 150, 90]], [0, 1, 2])


def found(*splits: Split, check: str) -> list[Finding]:
    return [finding for finding in check_annotations(splits) if finding.check == check]


def good(name: str) -> Split:
    return Plain(*[GOOD] * 12).split(name, name)


def test_a_good_set_is_good() -> None:
    assert check_annotations([good("train"), good("val")]) == []


def test_a_split_of_crowds_alone_teaches_nothing() -> None:
    repairs = Repairs()
    repairs.add("inverted", "line 3")
    (finding,) = found(Plain(GOOD, crowd=True).split(repairs=repairs), good("val"), check="nothing to learn")
    assert finding.severity == "error"
    assert "line 3" in finding.text


@pytest.mark.parametrize(("dropped", "severity"), [(0, "note"), (1, "warning"), (20, "error")])
def test_dropped_boxes_are_worse_the_more_they_are(dropped: int, severity: str) -> None:
    repairs = Repairs()
    repairs.add("clipped", "a")
    for _ in range(dropped):
        repairs.add("inverted", "b")
    (finding,) = found(Plain(*[GOOD] * 12).split(repairs=repairs), good("val"), check="mended boxes")
    assert finding.severity == severity


def test_tiny_boxes_are_counted() -> None:
    rows = [GOOD] * 11 + [([[10.0, 10, 11, 60]], [0])]
    (finding,) = found(Plain(*rows).split(), good("val"), check="tiny boxes")
    assert (finding.count, finding.severity) == (1, "warning")
    assert finding.places[0].boxes == ((10, 10, 11, 60),)
    assert "11.jpg: cat [10, 10, 11, 60]" in finding.places[0].where


def test_images_without_boxes() -> None:
    (finding,) = found(Plain(GOOD, ([], []), ([], [])).split(), good("val"), check="images without boxes")
    assert (finding.count, finding.severity) == (2, "warning")


def test_classes_that_a_split_lacks() -> None:
    some = Plain(*[(GOOD[0][:2], GOOD[1][:2])] * 12)
    (finding,) = found(good("train"), some.split("val", "v"), check="classes missing in a split")
    assert (finding.severity, "cow" in finding.text) == ("warning", True)
    (finding,) = found(some.split("train", "t"), good("val"), check="classes missing in a split")
    assert "never seen in training" in finding.advice
    (finding,) = found(some.split("train", "t"), some.split("val", "v"), check="classes without boxes")
    assert "cow" in finding.text


def test_rare_and_uneven_classes() -> None:
    many = Plain(*[([[5.0 * k, 5, 5 * k + 4, 20] for k in range(30)], [0] * 30)] * 10, ([[0.0, 0, 9, 9]], [1])).split()
    (finding,) = found(many, good("val"), check="rare classes")
    assert "dog" in finding.text
    (finding,) = found(many, good("val"), check="uneven classes")
    assert "300 boxes of cat, 1 of dog" in finding.text


def test_an_image_in_both_splits_is_a_leak() -> None:
    splits = Plain(*[GOOD] * 12).split("train"), Plain(*[GOOD] * 3).split("val")
    (finding,) = found(*splits, check="leaks between splits")
    assert (finding.count, finding.severity) == (3, "error")
    train = splits[0]
    train.paths[5] = train.paths[4]
    (finding,) = found(train, good("val"), check="images listed twice")
    assert finding.count == 1


BOX = st.tuples(*[st.integers(0, 12)] * 2, *[st.integers(1, 12)] * 2, st.integers(0, 2))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(BOX, max_size=12), min_size=1, max_size=4))
def test_repeated_boxes_are_all_pairs_that_overlap(rows: list[list[tuple[int, int, int, int, int]]]) -> None:
    """Against all pairs, with torchvision's overlap."""
    boxes = [[[float(x), y, x + w, y + h] for x, y, w, h, _ in row] for row in rows]
    labels = [[item[4] for item in row] for row in rows]
    same = other = 0
    for mine, classes in zip(boxes, labels, strict=True):
        overlap = box_iou(torch.tensor(mine).reshape(-1, 4), torch.tensor(mine).reshape(-1, 4))
        for one, two in combinations(range(len(mine)), 2):
            if overlap[one, two] >= SAME - 1e-6:
                same, other = same + (classes[one] == classes[two]), other + (classes[one] != classes[two])
    split = Plain(*zip(boxes, labels, strict=True)).split()
    counts = {finding.check: finding.count for finding in check_annotations([split])}
    assert counts.get("duplicate boxes", 0) == same
    assert counts.get("boxes with two classes", 0) == other


def test_any_data_set_and_parts_of_one_become_splits() -> None:
    shapes = ShapesDataset(length=6, size=64)
    part = Split.of("val", Subset(Subset(shapes, [5, 3, 1]), [2, 0]))
    assert len(part) == 2
    whole = [shapes[index].target for index in (1, 5)]
    np.testing.assert_array_equal(part.boxes, np.concatenate([target.boxes.numpy() for target in whole]))
    assert part.image.tolist() == [0] * len(whole[0].boxes) + [1] * len(whole[1].boxes)
    assert [split.name for split in read_splits(shapes, shapes)] == ["train", "val"]


def test_a_part_of_a_set_has_its_own_repairs() -> None:
    """As of a validation split that is made of the training images."""
    repairs = Repairs()
    rows = [([[10.0, 10, 50, 60], [60, 10, 50, 80]], [0, 0]), GOOD]
    whole = Plain(*rows)
    whole.records = [record.repaired(repairs, lambda i: f"box {i}") for record in whole.records]
    dataset = whole.split(repairs=repairs).dataset
    counts = [Split.of("train", Subset(dataset, [index])).repairs.counts for index in (0, 1)]
    assert counts == [{"inverted": 1}, {}]
    assert Split.of("train", dataset).repairs.counts == {"inverted": 1}
