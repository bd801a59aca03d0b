from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools import mask as rle

from dyndet.data.masks import Segmentation, decode_mask, encode_mask
from dyndet.data.records import FileDataset, Record, Repairs
from dyndet.errors import DataError
from dyndet.structures import Category

SIZE = (40, 60)
CATEGORIES = [Category(3, "cat"), Category(7, "dog")]


def record(boxes: list[list[float]], labels: list[int] | None = None, **options: object) -> Record:
    return Record.of(Path("a.png"), 1, SIZE, boxes, labels or [0] * len(boxes), **options)  # pyright: ignore


def saved(
    folder: Path, name: str, boxes: list[list[float]], labels: list[int], image_id: int, **options: object
) -> Record:
    Image.new("RGB", SIZE[::-1], "red").save(folder / name)
    return Record.of(folder / name, image_id, SIZE, boxes, labels, **options)  # pyright: ignore


# --- boxes


@pytest.mark.parametrize(
    ("box", "kind"),
    [
        ([float("nan"), 0, 5, 5], "non-finite"),
        ([0, 0, float("inf"), 5], "non-finite"),
        ([0, 0, 1e300, 5], "non-finite"),
        ([9, 0, 5, 5], "inverted"),
        ([0, 9, 5, 5], "inverted"),
        ([5, 5, 5, 9], "zero-size"),
        ([50, 5, 50 + 1e-9, 9], "zero-size"),
        ([60, 0, 70, 10], "outside"),
        ([-9, 0, 0, 10], "outside"),
        ([0, 41, 9, 50], "outside"),
    ],
)
def test_boxes_that_are_none_are_dropped_and_counted(box: list[float], kind: str) -> None:
    repairs = Repairs()
    mended = record([[1, 2, 3, 4], box], [0, 1], crowd=[False, True]).repaired(repairs, lambda i: f"annotation {i}")
    assert mended.boxes.tolist() == [[1, 2, 3, 4]]
    assert mended.labels.tolist() == [0]
    assert mended.crowd.tolist() == [False]
    assert repairs.counts == {kind: 1}
    assert repairs.examples == {kind: ["annotation 1"]}
    assert repairs.dropped == 1
    assert str(repairs) == f"1 {kind} dropped (annotation 1)"


def test_boxes_partly_outside_are_clipped_and_counted_beyond_rounding() -> None:
    repairs = Repairs()
    mended = record([[-5, -5, 70, 45], [0, 0, 60.05, 40], [3, 4, 5, 6]]).repaired(repairs, str)
    assert mended.boxes.tolist() == [[0, 0, 60, 40], [0, 0, 60, 40], [3, 4, 5, 6]]
    assert repairs.counts == {"clipped": 1}
    assert repairs.dropped == 0
    assert str(repairs) == "1 clipped to the image (0)"


def test_per_object_values_stay_aligned_when_boxes_are_dropped() -> None:
    parts: list[Segmentation] = [[[float(i)] * 6] for i in range(4)]
    full = Record(
        Path("a.png"),
        1,
        SIZE,
        np.array([[0, 0, 0, 0], [1, 1, 2, 2], [5, 5, 4, 4], [3, 3, 4, 4.0]]),
        np.arange(4),
        np.array([True, False, True, False]),
        np.arange(4, dtype=np.float32),
        parts,
        np.arange(10, 14),
    )
    mended = full.repaired(Repairs(), str)
    assert mended.labels.tolist() == [1, 3]
    assert mended.areas is not None
    assert mended.areas.tolist() == [1, 3]
    assert mended.annotation_ids is not None
    assert mended.annotation_ids.tolist() == [11, 13]
    assert mended.segmentations == [parts[1], parts[3]]
    assert mended.boxes.dtype == np.float32


@given(hnp.arrays(np.float64, (5, 4), elements=st.floats(width=64, allow_nan=True, allow_infinity=True)))
def test_whatever_goes_in_valid_boxes_come_out(boxes: np.ndarray) -> None:
    repairs = Repairs()
    mended = Record.of(Path("a.png"), 1, SIZE, boxes, [0] * 5).repaired(repairs, str).boxes
    assert np.isfinite(mended).all()
    assert (mended[:, 2:] > mended[:, :2]).all()
    assert (mended >= 0).all()
    assert (mended[:, ::2] <= SIZE[1]).all()
    assert (mended[:, 1::2] <= SIZE[0]).all()
    assert len(mended) == 5 - repairs.dropped


def test_the_summary_shows_only_a_few_examples() -> None:
    repairs = Repairs()
    assert not repairs
    assert str(repairs) == "none"
    for number in range(9):
        repairs.add("inverted", f"annotation {number}")
    assert repairs
    assert str(repairs) == "9 inverted dropped (annotation 0, annotation 1, annotation 2, ...)"


# --- dataset


def test_samples_hold_what_the_records_say(tmp_path: Path) -> None:
    first = saved(tmp_path, "a.png", [[1, 2, 30, 40], [0, 0, 5, 5]], [1, 0], 77, crowd=[False, True])
    second = saved(tmp_path, "b.png", [], [], 5)
    dataset = FileDataset([first, second], CATEGORIES)
    assert len(dataset) == 2
    assert dataset.sizes == [SIZE, SIZE]
    assert dataset.categories == CATEGORIES
    sample = dataset[0]
    assert sample.image.shape == (3, *SIZE)
    target = sample.target
    assert target.boxes.tolist() == [[1, 2, 30, 40], [0, 0, 5, 5]]
    assert (target.boxes.dtype, target.labels.dtype, target.crowd.dtype) == (torch.float32, torch.int64, torch.bool)
    assert target.labels.tolist() == [1, 0]
    assert target.crowd.tolist() == [False, True]
    assert (target.image_id, target.original_size, target.path) == (77, SIZE, str(tmp_path / "a.png"))
    assert target.masks is None
    empty = dataset[1].target
    assert empty.boxes.shape == (0, 4)
    assert empty.image_id == 5
    with pytest.raises(IndexError):
        dataset[2]


def test_a_sample_can_be_changed_without_changing_the_dataset(tmp_path: Path) -> None:
    dataset = FileDataset([saved(tmp_path, "a.png", [[1, 2, 30, 40]], [1], 1).repaired(Repairs(), str)], CATEGORIES)
    target = dataset[0].target
    target.boxes += 1
    target.labels += 1
    target.crowd |= True
    assert dataset[0].target.boxes.tolist() == [[1, 2, 30, 40]]
    assert dataset[0].target.labels.tolist() == [1]
    assert not dataset[0].target.crowd.any()


def test_empty_masks_have_a_shape(tmp_path: Path) -> None:
    dataset = FileDataset([saved(tmp_path, "a.png", [], [], 1, segmentations=[])], CATEGORIES, load_masks=True)
    masks = dataset[0].target.masks
    assert masks is not None
    assert masks.shape == (0, *SIZE)


def test_bad_sets_are_refused_at_once(tmp_path: Path) -> None:
    good = saved(tmp_path, "a.png", [], [], 1)
    with pytest.raises(DataError, match=r"list\.txt has no images"):
        FileDataset([], CATEGORIES, source="list.txt")
    with pytest.raises(DataError, match="image id 1 occurs 2 times"):
        FileDataset([good, good], CATEGORIES)
    with pytest.raises(DataError, match=r"gone\.png does not exist"):
        FileDataset([Record.of(tmp_path / "gone.png", 1, SIZE, [], [])], CATEGORIES)
    with pytest.raises(DataError, match=r"a\.png has 40 x 60 pixels .* for 60 x 40"):
        FileDataset([Record.of(tmp_path / "a.png", 1, (60, 40), [], [])], CATEGORIES)
    with pytest.raises(DataError, match=r"set data\.masks=false \(load_masks=False"):
        FileDataset([good], CATEGORIES, load_masks=True)


def test_a_later_image_is_checked_when_it_is_read(tmp_path: Path) -> None:
    records = [saved(tmp_path, "a.png", [], [], 1), Record.of(tmp_path / "gone.png", 2, SIZE, [], [])]
    dataset = FileDataset([*records, Record.of(tmp_path / "a.png", 3, (1, 2), [], [])], CATEGORIES)
    with pytest.raises(DataError, match=r"gone\.png does not exist"):
        dataset[1]
    with pytest.raises(DataError, match="are for 1 x 2"):
        dataset[2]


def test_a_malformed_mask_names_image_and_object(tmp_path: Path) -> None:
    broken = saved(tmp_path, "a.png", [[0, 0, 5, 5]], [0], 1, segmentations=[[[1.0, 2.0, 3.0]]])
    with pytest.raises(DataError, match=r"object 1 of image .*a\.png: segmentation is malformed"):
        FileDataset([broken], CATEGORIES, load_masks=True)[0]


def test_one_warning_sums_up_the_repairs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    repairs = Repairs()
    boxes = [[5.0, 5, 4, 4], [0, 0, 100, 10], [0, 0, 100, 20]]
    good = saved(tmp_path, "a.png", boxes, [0, 0, 1], 1).repaired(repairs, lambda i: f"annotation {i}")
    with caplog.at_level(logging.WARNING):
        dataset = FileDataset([good], CATEGORIES, repairs=repairs, source="x.json")
    assert dataset.repairs.counts == {"inverted": 1, "clipped": 2}
    (message,) = caplog.messages
    assert message == (
        "x.json: boxes mended: 1 inverted dropped (annotation 0); 2 clipped to the image (annotation 1, annotation 2); "
        "evaluation takes them as annotated"
    )
    caplog.clear()
    FileDataset([good], CATEGORIES)
    assert not caplog.messages


# --- masks


@given(hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40)))
def test_masks_survive_encoding_both_ways(mask: np.ndarray) -> None:
    size = (mask.shape[0], mask.shape[1])
    code = encode_mask(torch.from_numpy(mask))
    assert isinstance(code["counts"], str)
    assert code == encode_mask(mask)
    np.testing.assert_array_equal(rle.decode(code), mask)
    np.testing.assert_array_equal(decode_mask(code, size), mask)
    # Uncompressed: alternating runs down the columns, starting with zeros.
    flat = np.concatenate([[False], mask.T.ravel()])
    edges = np.flatnonzero(np.diff(flat.astype(np.int8)))
    runs = np.diff([0, *edges, mask.size]).tolist()
    np.testing.assert_array_equal(decode_mask({"size": list(size), "counts": runs}, size), mask)


def test_polygons_are_united_and_may_leave_the_image() -> None:
    left, right = [2.0, 2, 10, 2, 10, 10, 2, 10], [20.0, 5, 100, 5, 100, 60, 20, 60]
    mask = decode_mask([left, right, [1, 1, 2, 2]], SIZE)
    expected = np.zeros(SIZE, np.bool_)
    expected[2:10, 2:10] = expected[5:, 20:] = True
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(
    "segmentation",
    [
        [],
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [[[1, 2], [3, 4], [5, 6]]],
        [[1, 2, 3, float("nan"), 5, 6]],
        [[1, 2, 3, 4, 1e9, 6]],
        [["a", "b", "c", "d", "e", "f"]],
        {"size": [40, 60]},
        {"counts": [2400]},
        {"size": [60, 40], "counts": [2400]},
        {"size": [10**9, 10**9], "counts": [10**18]},
        {"size": [40, 60], "counts": [2399]},
        {"size": [40, 60], "counts": [2500, -100]},
        {"size": [40, 60], "counts": ""},
        {"size": [40, 60], "counts": "0"},
        {"size": [40, 60], "counts": "oooooooooooo"},
        {"size": [40, 60], "counts": "o"},
        {"size": [40, 60], "counts": "\u00e9\x00"},
        {"size": [40, 60], "counts": None},
        {"size": 5, "counts": [2400]},
    ],
    ids=str,
)
def test_malformed_segmentations_are_refused(segmentation: Segmentation) -> None:
    with pytest.raises(DataError, match="segmentation is malformed"):
        decode_mask(segmentation, SIZE)
