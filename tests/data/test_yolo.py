from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dyndet.data.yolo import YoloDataset
from dyndet.errors import DataError

NAMES = "names: [cat, dog]\n"


def write(root: Path, labels: dict[str, str | None], config: str = NAMES + "train: images/train\n") -> Path:
    """Images 100 wide, 50 high under images/train, with label files where there is a text."""
    for folder in ("images", "labels"):
        (root / folder / "train").mkdir(parents=True, exist_ok=True)
    for stem, text in labels.items():
        Image.new("RGB", (100, 50)).save(root / "images" / "train" / f"{stem}.png")
        if text is not None:
            (root / "labels" / "train" / f"{stem}.txt").write_text(text)
    file = root / "data.yaml"
    file.write_text(config)
    return file


def test_boxes_labels_and_ids(tmp_path: Path) -> None:
    labels = {"b": "1 0.5 0.5 0.2 0.4\n\n0 0.25 0.5 0.5 1\n", "a": None, "c": ""}
    dataset = YoloDataset(write(tmp_path, labels))
    assert [(category.id, category.name) for category in dataset.categories] == [(0, "cat"), (1, "dog")]
    assert [Path(record.path).stem for record in dataset.records] == ["a", "b", "c"]
    assert [record.image_id for record in dataset.records] == [1, 2, 3]
    target = dataset[1].target
    torch.testing.assert_close(target.boxes, torch.tensor([[40.0, 15, 60, 35], [0, 0, 50, 50]]))
    assert target.labels.tolist() == [1, 0]
    assert not target.crowd.any()
    assert [len(dataset[i].target.boxes) for i in range(3)] == [0, 2, 0]  # no label file, and an empty one: negatives
    assert dataset.sizes == [(50, 100)] * 3
    assert [record.image_id for record in YoloDataset(tmp_path / "data.yaml", skip_empty=True).records] == [2]


def test_names_as_mapping_may_have_gaps(tmp_path: Path) -> None:
    config = "names: {7: dog, 2: cat}\ntrain: images/train\n"
    dataset = YoloDataset(write(tmp_path, {"a": "7 0.5 0.5 0.2 0.4\n2.0 0.5 0.5 0.2 0.4"}, config))
    assert [(category.id, category.name) for category in dataset.categories] == [(2, "cat"), (7, "dog")]
    assert dataset[0].target.labels.tolist() == [1, 0]


def test_polygons_give_boxes_and_masks(tmp_path: Path) -> None:
    file = write(tmp_path, {"a": "0 0.1 0.2 0.5 0.2 0.5 0.6 0.1 0.6"})
    assert YoloDataset(file)[0].target.masks is None
    target = YoloDataset(file, load_masks=True)[0].target
    torch.testing.assert_close(target.boxes, torch.tensor([[10.0, 10, 50, 30]]))
    expected = np.zeros((1, 50, 100), np.bool_)
    expected[0, 10:30, 10:50] = True
    assert target.masks is not None
    np.testing.assert_array_equal(target.masks.numpy(), expected)
    (tmp_path / "labels" / "train" / "a.txt").write_text("0 0.1 0.2 0.5 0.2")
    with pytest.raises(DataError, match=r"a\.txt line 1 is a box without a polygon"):
        YoloDataset(file, load_masks=True)


@pytest.mark.parametrize("split", ["images/train", "list.txt", "[images/train, list.txt]", "./images"])
def test_splits_are_folders_lists_or_several(tmp_path: Path, split: str) -> None:
    file = write(tmp_path, {"a": "0 0.5 0.5 0.2 0.4", "b": None}, NAMES + f"train: {split}\n")
    (tmp_path / "list.txt").write_text(f"./images/train/a.png\n\n{tmp_path}/images/train/b.png\n")
    (tmp_path / "images" / "train" / "notes.md").write_text("not an image")
    dataset = YoloDataset(file)
    assert [Path(record.path).name for record in dataset.records] == ["a.png", "b.png"]
    assert [len(record.boxes) for record in dataset.records] == [1, 0]


def test_the_last_images_folder_below_the_root_becomes_labels(tmp_path: Path) -> None:
    root = tmp_path / "images" / "set"  # "images" above the root is not the data's
    nested = root / "images" / "x" / "images"
    nested.mkdir(parents=True)
    Image.new("RGB", (100, 50)).save(nested / "a.png")
    (root / "images" / "x" / "labels").mkdir()
    (root / "images" / "x" / "labels" / "a.txt").write_text("0 0.5 0.5 0.2 0.4")
    (root / "data.yaml").write_text(NAMES + "train: images\nval: flat\n")
    assert len(YoloDataset(root / "data.yaml")[0].target.boxes) == 1
    (root / "flat").mkdir()
    Image.new("RGB", (100, 50)).save(root / "flat" / "b.png")
    (root / "flat" / "b.txt").write_text("1 0.5 0.5 0.2 0.4\n1 0.5 0.5 0.2 0.4")
    assert len(YoloDataset(root / "data.yaml", split="val")[0].target.boxes) == 2  # beside the image


def test_a_yaml_may_name_folders_beside_it_or_of_another_machine(tmp_path: Path) -> None:
    write(tmp_path / "set", {"a": "0 0.5 0.5 0.2 0.4"})
    for train in (
        "../images/train",
        "/home/somebody/set/images/train",
        "D:\\set\\images\\train",
        "../set/images/train",
    ):
        (tmp_path / "set" / "data.yaml").write_text(f"{NAMES}path: /no/such/folder\ntrain: {train}\n")
        (record,) = YoloDataset(tmp_path / "set" / "data.yaml").records
        assert record.path == tmp_path / "set" / "images" / "train" / "a.png" and len(record.boxes) == 1


def test_lists_stay_in_the_declared_folders(tmp_path: Path) -> None:
    file = write(tmp_path / "set", {"a": "0 0.5 0.5 0.2 0.4"}, NAMES + "train: list.txt\n")
    Image.new("RGB", (100, 50)).save(tmp_path / "secret.png")
    for line in ("/home/somebody/set/images/train/a.png", "./images/train/a.png", "set\\images\\train\\a.png"):
        (tmp_path / "set" / "list.txt").write_text(line)
        assert [record.path.name for record in YoloDataset(file).records] == ["a.png"]
    for line in (str(tmp_path / "secret.png"), "../secret.png"):
        (tmp_path / "set" / "list.txt").write_text(line)
        with pytest.raises(DataError, match=r"list\.txt: .*does not lie inside .*set data\.root"):
            YoloDataset(file)


def test_images_without_a_label_file_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path, {"a": "0 0.5 0.5 0.2 0.4", "b": None, "c": None})
    dataset = YoloDataset(file)
    assert [path.name for path in dataset.unlabelled] == ["b.png", "c.png"]
    assert "2 of 3 images have no label file, e.g. " in caplog.text and "b.png: negatives on purpose" in caplog.text


def test_labels_may_lie_beside_the_images_of_some_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "one", {"a": "0 0.5 0.5 0.2 0.4"})
    write(tmp_path / "two", {"b": "1 0.5 0.5 0.2 0.4"})
    (tmp_path / "two" / "labels" / "train" / "b.txt").rename(tmp_path / "two" / "images" / "train" / "b.txt")
    (tmp_path / "all.yaml").write_text(NAMES + "train: [one/images/train, two/images/train]\n")
    dataset = YoloDataset(tmp_path / "all.yaml")
    assert [record.labels.tolist() for record in dataset.records] == [[0], [1]]
    assert not dataset.unlabelled and not caplog.messages


def test_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data", {"a": "0 0.5 0.5 0.2 0.4"})
    (tmp_path / "x.yaml").write_text(NAMES + "path: data\ntrain: images/train\n")
    assert len(YoloDataset(tmp_path / "x.yaml")) == 1
    (tmp_path / "other").mkdir()
    outside = tmp_path / "other" / "x.yaml"
    outside.write_text(NAMES + "path: ../data\ntrain: images/train\n")
    assert len(YoloDataset(outside)) == 1  # declared by the owner of the yaml
    assert len(YoloDataset(outside, root=tmp_path / "data")) == 1
    monkeypatch.chdir(tmp_path)
    assert len(YoloDataset("other/x.yaml", root="data")) == 1
    assert len(YoloDataset("x.yaml")) == 1


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("0 nan 0.5 0.2 0.2", "non-finite"),
        ("0 0.5 0.5 inf 0.2", "non-finite"),
        ("0 0.5 0.5 -0.2 0.2", "inverted"),
        ("0 0.5 0.5 0 0.2", "zero-size"),
        ("0 0.5 0.2 0.6 0.2 0.7 0.2", "zero-size"),
        ("0 50 25 10 10", "outside"),
        ("0 0 0 0.2 0.2", "clipped"),
    ],
)
def test_bad_boxes_are_mended_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, line: str, kind: str
) -> None:
    dataset = YoloDataset(write(tmp_path, {"a": "0 0.5 0.5 0.2 0.4\n" + line}))
    assert dataset.repairs.counts == {kind: 1}
    assert len(dataset[0].target.boxes) == 1 + (kind == "clipped")
    assert "a.txt line 2" in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.2 0.4", "has class 2"),
        ("-1 0.5 0.5 0.2 0.4", "has class -1"),
        ("0.5 0.5 0.5 0.2 0.4", "is '0.5 0.5"),
        ("nan 0.5 0.5 0.2 0.4", "is 'nan"),
        ("0 0.5 0.5 0.2", "is '0 0.5"),
        ("0 0.5 0.5 0.2 0.4 0.9", "is '0 0.5"),
        ("0 0.5 0.5 0.2 0.4 0.9 1 1", "is '0 0.5"),
        ("dog 0.5 0.5 0.2 0.4", "is 'dog"),
        ("0" + " 0.5" * 50_001, "is '0 0.5"),
    ],
)
def test_malformed_lines_are_refused_by_name(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        YoloDataset(write(tmp_path, {"a": "0 0.5 0.5 0.2 0.4\n" + line}))
    assert "a.txt line 2" in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "is not a YOLO configuration"),
        ("[1, 2]", "is not a YOLO configuration"),
        ("names: [", "is not valid yaml"),
        ("names: !!python/object/apply:os.system [exit]\ntrain: images/train", "is not valid yaml"),
        ("train: images/train", "no usable names"),
        ("names: {a: 1}\ntrain: images/train", "no usable names"),
        ("nc: 3\n" + NAMES + "train: images/train", "nc 3 but 2 names"),
        (NAMES + "val: images/train", r"no split 'train': choose one of those it has \(val\)"),
        (NAMES + "train: images/tarin", "images/tarin, which does not exist"),
        (NAMES + "train: labels", "has no images"),
        (NAMES + "train: ../imagse", "imagse, which does not exist"),
        (NAMES + "train: /etc", "/etc, which has no images"),
        (NAMES + "train: /etc/passwd", "passwd line 1 names no image"),
        (NAMES + "path: /\ntrain: etc", "/etc, which has no images"),
        (NAMES + "train: hostile.txt", r"hostile\.txt: .*does not lie inside"),
        (NAMES + "train: absent.txt", r"gone\.png does not exist"),
    ],
)
def test_malformed_configurations_are_refused(tmp_path: Path, config: str, message: str) -> None:
    file = write(tmp_path, {"a": "0 0.5 0.5 0.2 0.4"}, config)
    (tmp_path / "hostile.txt").write_text("images/train/a.png\n../../secret.png\n")
    (tmp_path / "absent.txt").write_text("images/train/a.png\nimages/train/gone.png\n")
    with pytest.raises(DataError, match=message):
        YoloDataset(file)


def test_a_wrong_layout_is_not_taken_for_negatives(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no image of split 'train' .* has labels: .*labels/train/a\.txt"):
        YoloDataset(write(tmp_path, {"a": None, "b": None}))
    with pytest.raises(DataError, match=r"none\.yaml cannot be read"):
        YoloDataset(tmp_path / "none.yaml")


def test_images_may_lie_on_another_disk(tmp_path: Path) -> None:
    file = write(tmp_path / "set", {"a": "0 0.5 0.5 0.2 0.4"})
    Image.new("RGB", (100, 50)).save(tmp_path / "other.png")
    (tmp_path / "set" / "images" / "train" / "b.png").symlink_to(tmp_path / "other.png")
    (tmp_path / "set" / "images").rename(tmp_path / "disk")
    (tmp_path / "set" / "images").symlink_to(tmp_path / "disk")
    assert [len(YoloDataset(file)[index].target.boxes) for index in range(2)] == [1, 0]


def test_labels_in_pixels_are_refused_as_such(tmp_path: Path) -> None:
    file = write(tmp_path, {"a": "0 50 25 10 10\n1 20 20 8 8", "b": "0 70 25 10 10", "c": None})
    with pytest.raises(DataError, match=r"all 3 boxes lie far outside .* look like pixels where 0\.\.1 is expected"):
        YoloDataset(file)


@pytest.mark.data
def test_real_set_agrees_with_the_raw_text(shared_data: Path) -> None:
    root = shared_data / "coco_yolo"
    dataset = YoloDataset(root / "config.yaml")
    assert len(dataset.categories) == 80
    assert (dataset.categories[0].id, dataset.categories[0].name) == (0, "person")
    assert not dataset.repairs
    assert len(dataset) == 15
    negatives = []
    for index in range(len(dataset)):
        sample = dataset[index]
        stem = Path(sample.target.path).stem
        file = root / "labels" / "train2017" / f"{stem}.txt"
        if not file.exists():
            negatives.append(stem)
            assert sample.target.boxes.shape == (0, 4)
            continue
        rows = np.loadtxt(file, ndmin=2)
        height, width = sample.image.shape[1:]
        boxes = sample.target.boxes.double().numpy()
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2 / (width, height)
        sides = (boxes[:, 2:] - boxes[:, :2]) / (width, height)
        np.testing.assert_allclose(np.concatenate([centres, sides], 1), rows[:, 1:], atol=2e-6)
        np.testing.assert_array_equal(sample.target.labels.numpy(), rows[:, 0])
    assert negatives == ["000000000508"]
    assert sum(len(record.boxes) for record in dataset.records) == 133


@pytest.mark.data
def test_the_split_that_is_not_shipped_is_named(shared_data: Path) -> None:
    with pytest.raises(DataError, match="val2017, which does not exist"):
        YoloDataset(shared_data / "coco_yolo" / "config.yaml", split="val")
