from __future__ import annotations

import contextlib
import copy
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from dyndet.data.coco import CocoDataset
from dyndet.errors import DataError

RUNS = {"size": [40, 60], "counts": [0, 40, 2360]}
BASE: dict[str, Any] = {
    "images": [
        {"id": 90, "file_name": "b.png", "height": 40, "width": 60},
        {"id": 7, "file_name": "a.png", "height": 40, "width": 60},
        {"id": 12, "file_name": "empty.png", "height": 40, "width": 60},
    ],
    "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}, {"id": 90, "name": "brush"}],
    "annotations": [
        {
            "id": 5,
            "image_id": 7,
            "category_id": 90,
            "bbox": [1.5, 2, 10, 20],
            "area": 150.25,
            "segmentation": [[1.5, 2, 11.5, 2, 11.5, 22, 1.5, 22]],
        },
        {
            "id": 9,
            "image_id": 7,
            "category_id": 3,
            "bbox": [30, 0, 30, 40],
            "iscrowd": 0,
            "segmentation": [[30, 0, 60, 0, 60, 40]],
        },
        {"id": 11, "image_id": 90, "category_id": 18, "bbox": [0, 0, 1, 40], "iscrowd": 1, "segmentation": RUNS},
    ],
}


def write(folder: Path, content: object) -> Path:
    for name in ("a.png", "b.png", "empty.png"):
        Image.new("RGB", (60, 40)).save(folder / name)
    file = folder / "set.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    content = copy.deepcopy(BASE)
    change(content)
    return content


def test_ids_with_gaps_come_back_unchanged_and_labels_are_contiguous(tmp_path: Path) -> None:
    dataset = CocoDataset(write(tmp_path, BASE), tmp_path)
    assert [(category.id, category.name) for category in dataset.categories] == [(3, "car"), (18, "dog"), (90, "brush")]
    targets = [dataset[i].target for i in range(len(dataset))]
    assert [target.image_id for target in targets] == [90, 7, 12]
    assert targets[1].labels.tolist() == [2, 0]
    assert [dataset.categories[label].id for label in targets[1].labels] == [90, 3]
    assert targets[1].boxes.tolist() == [[1.5, 2, 11.5, 22], [30, 0, 60, 40]]
    assert targets[1].area is not None
    assert targets[1].area.tolist() == [150.25, 1200]  # annotated, of the box
    assert [target.crowd.tolist() for target in targets] == [[True], [False, False], []]
    assert not dataset.repairs


def test_classes_choose_and_order(tmp_path: Path) -> None:
    file = write(tmp_path, BASE)
    dataset = CocoDataset(file, tmp_path, classes=["brush", "dog"])
    assert [category.id for category in dataset.categories] == [90, 18]
    assert [dataset[i].target.labels.tolist() for i in range(3)] == [[1], [0], []]
    with pytest.raises(DataError, match="no category 'bush': choose classes from car, dog, brush"):
        CocoDataset(file, tmp_path, classes=["bush"])


def test_skip_empty_leaves_out_images_without_a_box_that_trains(tmp_path: Path) -> None:
    file = write(tmp_path, BASE)
    assert [record.image_id for record in CocoDataset(file, tmp_path, skip_empty=True).records] == [7]
    assert len(CocoDataset(file, tmp_path)) == 3
    with pytest.raises(DataError, match="no images"):
        CocoDataset(file, tmp_path, classes=["dog"], skip_empty=True)


def test_masks_of_polygons_and_run_lengths(tmp_path: Path) -> None:
    dataset = CocoDataset(write(tmp_path, BASE), tmp_path, load_masks=True)
    masks = [dataset[i].target.masks for i in range(3)]
    assert [mask.shape for mask in masks if mask is not None] == [(1, 40, 60), (2, 40, 60), (0, 40, 60)]
    assert masks[0] is not None
    assert masks[0][0, :, 0].all()
    assert masks[0].sum() == 40


def test_byte_order_mark_and_extra_keys_do_not_matter(tmp_path: Path) -> None:
    file = write(tmp_path, BASE)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(CocoDataset(file, str(tmp_path))) == 3


@pytest.mark.parametrize(
    ("box", "kind"),
    [
        ([0, 0, math.nan, 5], "non-finite"),
        ([0, 0, math.inf, 5], "non-finite"),
        ([0, 0, 10**400, 5], "non-finite"),
        ([1e308, 0, 1e308, 5], "non-finite"),
        ([5, 5, -2, 5], "inverted"),
        ([5, 5, 0, 5], "zero-size"),
        ([100, 0, 5, 5], "outside"),
        ([55, 0, 10, 5], "clipped"),
        ([-5, 0, 10, 5], "clipped"),
    ],
)
def test_bad_boxes_are_mended_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, box: list[float], kind: str
) -> None:
    file = write(tmp_path, changed(lambda c: c["annotations"][0].update(bbox=box)))
    dataset = CocoDataset(file, tmp_path)
    assert dataset.repairs.counts == {kind: 1}
    assert len(dataset[1].target.boxes) == (2 if kind == "clipped" else 1)
    (message,) = caplog.messages
    assert "annotation 5" in message
    assert str(file) in message


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no images": (lambda c: c.pop("images"), '"images"'),
    "no annotations": (lambda c: c.pop("annotations"), '"annotations"'),
    "categories no list": (lambda c: c.update(categories={}), '"categories"'),
    "entries no objects": (lambda c: c.update(annotations=[[1, 2, 3]]), '"annotations"'),
    "no image at all": (lambda c: c.update(images=[], annotations=[]), "has no images"),
    "image twice": (lambda c: c["images"][0].update(id=7), r"image id 7 occurs twice \(a.png\)"),
    "annotation twice": (lambda c: c["annotations"][1].update(id=5), "annotation 5 occurs twice"),
    "category twice": (lambda c: c["categories"][1].update(id=18), "category ids must be unique"),
    "unknown category": (lambda c: c["annotations"][1].update(category_id=4), "annotation 9 has category_id 4"),
    "unknown image": (lambda c: c["annotations"][1].update(image_id=8), "annotation 9 has image_id 8"),
    "no annotation id": (lambda c: c["annotations"][1].pop("id"), "annotation at position 1 has id None"),
    "text id": (lambda c: c["images"][1].update(id="seven"), "image a.png has id 'seven'"),
    "id between": (lambda c: c["images"][1].update(id=7.5), "image a.png has id 7.5"),
    "unknown crowd": (lambda c: c["annotations"][1].update(iscrowd="perhaps"), "annotation 9 has iscrowd 'perhaps'"),
    "crowd 2": (lambda c: c["annotations"][1].update(iscrowd=2), "annotation 9 has iscrowd 2"),
    "no categories": (lambda c: c.update(categories=[], annotations=[]), "has no categories"),
    "negative category": (lambda c: c["categories"][0].update(id=-1), "category_id 18|category 'dog' has id -1"),
    "empty name": (lambda c: c["categories"][0].update(name=" "), "category 18 has no name"),
    "name twice": (lambda c: c["categories"][0].update(name="car"), "categories 3 and 18 are both called 'car'"),
    "list as name": (lambda c: c["categories"][0].update(name=["dog"]), r"category 18 has name \['dog'\]"),
    "no text file name": (lambda c: c["images"][1].update(file_name=None), "image 7 has file_name None"),
    "backslashes out": (lambda c: c["images"][1].update(file_name="..\\a.png"), "image 7: .*does not lie inside"),
    "no name": (lambda c: c["categories"][1].pop("name"), "'name'"),
    "no file name": (lambda c: c["images"][1].pop("file_name"), "'file_name'"),
    "no height": (lambda c: c["images"][1].pop("height"), "image 7 has height None"),
    "no width": (lambda c: c["images"][1].update(width=0), "image 7 has a height or width below 1"),
    "no box": (lambda c: c["annotations"][1].pop("bbox"), "annotation 9 has bbox None"),
    "short box": (lambda c: c["annotations"][1].update(bbox=[1, 2, 3]), r"annotation 9 has bbox \[1, 2, 3\]"),
    "text box": (lambda c: c["annotations"][1].update(bbox=["one", 2, 3, 4]), "annotation 9 has bbox"),
    "bad area": (lambda c: c["annotations"][1].update(area=math.nan), "annotation 9 has area nan"),
    "parent": (lambda c: c["images"][1].update(file_name="../a.png"), "image 7: .*does not lie inside"),
    "absolute": (lambda c: c["images"][1].update(file_name="/etc/passwd"), "image 7: .*does not lie inside"),
    "missing first image": (lambda c: c["images"][0].update(file_name="gone.png"), r"gone\.png does not exist"),
    "wrong size": (lambda c: c["images"][0].update(width=61), r"b\.png has 40 x 60 .* 40 x 61"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_malformed_content_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    change, message = BROKEN[fault]
    with pytest.raises(DataError, match=message) as caught:
        CocoDataset(write(tmp_path, changed(change)), tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "<html></html>", "id,bbox\n1,2", "[" * 100_000, "[]", "null", "5"])
def test_what_is_no_coco_json_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"set\.json"):
        CocoDataset(write(tmp_path, text), tmp_path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json cannot be read"):
        CocoDataset(tmp_path / "none.json", tmp_path)
    with pytest.raises(DataError, match=r"image folder .*nowhere does not exist"):
        CocoDataset(write(tmp_path, BASE), tmp_path / "nowhere")


def test_images_may_be_links_to_another_disk(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    file = write(tmp_path, BASE)
    for name in ("a.png", "b.png", "empty.png"):
        (tmp_path / "images" / name).symlink_to(tmp_path / name)
    assert CocoDataset(file, tmp_path / "images")[0].image.shape == (3, 40, 60)


def as_texts(content: dict[str, Any]) -> None:
    """The same numbers as other programs write them."""
    for image in content["images"]:
        image.update(id=float(image["id"]), width=str(image["width"]), height=float(image["height"]))
    for category in content["categories"]:
        category["id"] = str(category["id"])
    for entry in content["annotations"]:
        entry.update(
            id=str(entry["id"]), image_id=str(entry["image_id"]), category_id=float(entry["category_id"]),
            bbox=[str(side) for side in entry["bbox"]], iscrowd=str(entry.get("iscrowd", 0)),
        )  # fmt: skip
        if "area" in entry:
            entry["area"] = str(entry["area"])


def test_numbers_written_as_texts_and_floats_are_read(tmp_path: Path) -> None:
    expected = CocoDataset(write(tmp_path, BASE), tmp_path)
    text = json.dumps(changed(as_texts), indent=1).replace("\n", "\r\n")
    dataset = CocoDataset(write(tmp_path, "\ufeff" + text), tmp_path)
    assert dataset.categories == expected.categories
    for found, known in zip(dataset.records, expected.records, strict=True):
        assert (found.image_id, found.size, found.path) == (known.image_id, known.size, known.path)
        np.testing.assert_array_equal(found.boxes, known.boxes)
        np.testing.assert_array_equal(found.labels, known.labels)
        np.testing.assert_array_equal(found.crowd, known.crowd)  # "0" is no crowd
        np.testing.assert_array_equal(found.areas, known.areas)  # pyright: ignore[reportArgumentType]
        np.testing.assert_array_equal(found.annotation_ids, known.annotation_ids)  # pyright: ignore[reportArgumentType]
    assert [record.crowd.tolist() for record in dataset.records] == [[True], [False, False], []]


def test_names_of_other_systems_are_found(tmp_path: Path) -> None:
    names = {90: "train\\b c.png", 7: "./train/n\u0303o%20.png", 12: "train/100%25.png"}
    file = write(tmp_path, changed(lambda c: [image.update(file_name=names[image["id"]]) for image in c["images"]]))
    (tmp_path / "train").mkdir()
    for name in ("b c.png", "\u00f1o .png", "100%.png"):
        (tmp_path / "train" / name).write_bytes((tmp_path / "a.png").read_bytes())
    dataset = CocoDataset(file, tmp_path)
    assert [record.path.name for record in dataset.records] == ["b c.png", "\u00f1o .png", "100%.png"]
    assert len(dataset[0].image) == 3


@pytest.mark.parametrize("used", [False, True])
def test_a_placeholder_for_all_classes_is_left_out_unless_it_is_used(tmp_path: Path, used: bool) -> None:
    content = changed(lambda c: [item.update(supercategory="pets") for item in c["categories"]])
    content["categories"].append({"id": 0, "name": "pets", "supercategory": "none"})
    if used:
        content["annotations"][0]["category_id"] = 0
    ids = [category.id for category in CocoDataset(write(tmp_path, content), tmp_path).categories]
    assert ids == ([0] if used else []) + [3, 18, 90]


def test_all_boxes_in_shares_of_the_image_are_refused(tmp_path: Path) -> None:
    def normalise(content: dict[str, Any]) -> None:
        for entry in content["annotations"]:
            entry["bbox"] = [value / side for value, side in zip(entry["bbox"], (60, 40) * 2, strict=True)]

    content = changed(normalise)
    with pytest.raises(DataError, match=r"set\.json: all 3 boxes .* look normalised: multiply"):
        CocoDataset(write(tmp_path, content), tmp_path)
    content["annotations"][0]["bbox"] = [1.5, 2, 10, 20]  # one box is small, not the unit wrong
    dataset = CocoDataset(write(tmp_path, content), tmp_path)
    assert dataset.repairs.counts["tiny"] == 2
    assert dataset.repairs.dropped == 0


def test_corners_in_place_of_width_and_height_are_refused(tmp_path: Path) -> None:
    def cornered(content: dict[str, Any]) -> None:
        boxes = [[1, 2, 30, 39], [20, 10, 59, 39], [30, 20, 50, 38], [40, 5, 58, 30], [2, 3, 20, 20]]
        entry = content["annotations"][0]
        content["annotations"] = [entry | {"id": i, "bbox": box, "area": 9} for i, box in enumerate(boxes, start=1)]

    content = changed(cornered)
    with pytest.raises(DataError, match=r"3 of 5 boxes leave their images, and none would as \[x1, y1, x2, y2\]"):
        CocoDataset(write(tmp_path, content), tmp_path)
    content["annotations"][4]["bbox"] = [20, 20, 10, 10]  # which no corners could be
    assert CocoDataset(write(tmp_path, content), tmp_path).repairs.counts["clipped"] == 4


def test_sizes_may_be_those_of_the_images_and_classes_one_name(tmp_path: Path) -> None:
    content = changed(lambda c: [item.pop(key) for item in c["images"] for key in ("height", "width")])
    whole = CocoDataset(write(tmp_path, changed(lambda c: None)), tmp_path)
    dataset = CocoDataset(write(tmp_path, content), tmp_path)
    assert dataset.sizes == whole.sizes
    name = whole.categories[0].name
    assert [item.name for item in CocoDataset(write(tmp_path, content), tmp_path, classes=name).categories] == [name]


def test_masks_need_segmentations(tmp_path: Path) -> None:
    file = write(tmp_path, changed(lambda c: c["annotations"][1].pop("segmentation")))
    assert CocoDataset(file, tmp_path)[1].target.masks is None
    with pytest.raises(DataError, match="annotation 9 has no segmentation"):
        CocoDataset(file, tmp_path, load_masks=True)
    file = write(tmp_path, changed(lambda c: c["annotations"][1].update(segmentation=[[1, 2, 3]])))
    dataset = CocoDataset(file, tmp_path, load_masks=True)
    with pytest.raises(DataError, match=r"annotation 9 of image .*a\.png"):
        dataset[1]


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "split"), [("coco_mini", "train"), ("coco_mini", "val"), ("bccd", "train"), ("bccd", "val")]
)
def test_real_sets_agree_with_pycocotools(shared_data: Path, name: str, split: str) -> None:
    file, images = shared_data / name / "annotations" / f"{split}.json", shared_data / name / "images"
    with contextlib.redirect_stdout(io.StringIO()):
        oracle = COCO(str(file))
    has_masks = name == "coco_mini"
    dataset = CocoDataset(file, images, load_masks=has_masks)
    assert [category.id for category in dataset.categories] == sorted(oracle.getCatIds())
    assert [record.image_id for record in dataset.records] == [entry["id"] for entry in oracle.dataset["images"]]
    assert not dataset.repairs
    crowds = 0
    for index in range(len(dataset)) if has_masks else range(0, len(dataset), 20):
        target = dataset[index].target
        entries = oracle.loadAnns(oracle.getAnnIds(imgIds=[target.image_id]))
        expected = np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4)
        expected[:, 2:] += expected[:, :2]
        np.testing.assert_allclose(target.boxes.numpy(), expected, rtol=1e-6, atol=0.02)  # clipped by a rounded digit
        assert [dataset.categories[label].id for label in target.labels] == [e["category_id"] for e in entries]
        assert target.crowd.tolist() == [bool(entry["iscrowd"]) for entry in entries]
        assert target.area is not None
        np.testing.assert_allclose(target.area.numpy(), [entry["area"] for entry in entries], rtol=1e-6)
        crowds += int(target.crowd.sum())
        if has_masks:
            assert target.masks is not None
            for mask, entry in zip(target.masks, entries, strict=True):
                np.testing.assert_array_equal(mask.numpy(), oracle.annToMask(entry).astype(bool))
    assert crowds == {"train": 8, "val": 6}[split] * has_masks
    assert sum(len(record.boxes) for record in dataset.records) == len(oracle.anns)


@pytest.mark.data
def test_real_empty_images_are_kept_unless_skipped(shared_data: Path) -> None:
    root = shared_data / "coco_mini"
    lengths = [
        len(CocoDataset(root / "annotations" / "val.json", root / "images", skip_empty=skip)) for skip in (False, True)
    ]
    assert lengths == [33, 31]
