"""Folders as tools leave them: recognised, read as they were written, and refused where they are two things."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Literal

import layout_cases as cases
import pytest
import torch
from PIL import Image

from dyndet.cli.compose import build, compose_command
from dyndet.data import coco, orientation, records, voc, yolo
from dyndet.data.layouts import coco_layout
from dyndet.data.layouts.describe import describe
from dyndet.data.layouts.folder import DataFolder
from dyndet.data.transforms import resizing
from dyndet.errors import DataError, UserError
from dyndet.structures import Sample, Target

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("case", cases.CASES, ids=[case.build.__name__ for case in cases.CASES])
def test_layouts_are_recognised_and_equal_their_source(case: cases.Case, tmp_path: Path) -> None:
    outcome = cases.try_layout(case, tmp_path)
    assert outcome.good, outcome


def test_the_table_of_layouts_is_up_to_date(tmp_path: Path) -> None:
    told = "run `python tests/data/layout_cases.py`"
    assert (DOCS / "layouts.md").read_text() == cases.table(tmp_path), told


@pytest.mark.parametrize("name", ["my (photos) [a=b]", "obst çöğ 果物", "a b"])
def test_folders_of_any_name(name: str, tmp_path: Path) -> None:
    for case in cases.CASES[::4]:
        assert cases.try_layout(case, tmp_path / case.build.__name__ / name).good


def test_home_and_links_to_other_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases.yolo_roboflow(tmp_path / "disk" / "fruit")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "disk" / "fruit")
    for part in ("data.yaml", "train", "valid"):
        (tmp_path / "data" / part).symlink_to(tmp_path / "disk" / "fruit" / part)
    (tmp_path / "data" / "link").unlink()
    monkeypatch.setenv("HOME", str(tmp_path))
    for root in ("~/data", "~/disk/fruit", "~/disk/fruit/data.yaml"):
        folder = DataFolder(root)
        assert [cases.indices_of(folder.read(part)) for part in ("train", "val")] == [set(cases.TRAIN), set(cases.VAL)]


def test_a_link_back_into_the_folder_is_no_second_set(tmp_path: Path) -> None:
    cases.coco_beside(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path)
    assert DataFolder(tmp_path).found.layout == "COCO json (fruit.json)"


@pytest.mark.parametrize(
    ("builds", "words"),
    [
        ([cases.coco_one, cases.yolo_usual], ["COCO json (labels.json) and YOLO (data.yaml)", "data.format=coco or"]),
        (
            [cases.voc_flat, cases.yolo_beside],
            ["YOLO without a yaml", "VOC xml", "data.format=yolo or data.format=voc"],
        ),
    ],
)
def test_two_formats_in_one_folder_are_named_with_the_key(builds: list, words: list[str], tmp_path: Path) -> None:
    for part in builds:
        part(tmp_path)
    with pytest.raises(UserError) as caught:
        _ = DataFolder(tmp_path).found
    assert all(word in str(caught.value) for word in words), caught.value
    for format in ("coco", "yolo", "voc"):
        if f"data.format={format}" in str(caught.value):
            assert len(DataFolder(tmp_path, format=format).read("train").records) > 4


def test_two_files_for_one_split_are_named_with_the_key(tmp_path: Path) -> None:
    cases.coco_named(tmp_path)
    cases.coco(tmp_path / "annotations" / "train_small.json", [0, 1])
    with pytest.raises(UserError, match=r"_v2\.json, annotations/train_small\.json; .*data\.train_annotations"):
        _ = DataFolder(tmp_path).found
    folder = DataFolder(tmp_path, train_annotations=tmp_path / "annotations" / "train_small.json")
    assert cases.indices_of(folder.read("train")) == {0, 1}
    assert cases.indices_of(folder.read("val")) == set(cases.VAL)
    (tmp_path / "yolo").mkdir()
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / "yolo" / name).write_text("train: images\nnames: [a]\n")
    with pytest.raises(UserError, match=r"a\.yaml, b\.yaml; choose one by data=yolo data\.config=FILE"):
        _ = DataFolder(tmp_path / "yolo").found


@pytest.mark.parametrize("name", ["/etc/hostname", "../secret.jpg", "C:\\secret.jpg"])
def test_a_json_cannot_name_files_outside(name: str, tmp_path: Path) -> None:
    Image.new("RGB", (cases.WIDTH, cases.HEIGHT)).save(tmp_path / "secret.jpg")
    cases.coco_one(tmp_path / "set")
    file = tmp_path / "set" / "labels.json"
    content = json.loads(file.read_text())
    content["images"][-1]["file_name"] = name
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="does not lie inside"):
        DataFolder(tmp_path / "set").read("train")
    for entry in content["images"]:
        entry["file_name"] = name
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="lie in no folder of"):
        DataFolder(tmp_path / "set").read("train")


def test_recognising_opens_no_image_and_parses_each_json_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    for module in (records, orientation, yolo, voc):
        for name in ("read_header", "image_size"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, opened.append)
    for case in cases.CASES:
        case.build(tmp_path / case.build.__name__)
        _ = DataFolder(tmp_path / case.build.__name__).found
    assert not opened
    monkeypatch.undo()
    parsed: list[str] = []
    load = coco.load_coco
    for module in (coco, coco_layout):
        monkeypatch.setattr(module, "load_coco", lambda file: parsed.append(Path(file).name) or load(file))
    for layout in (cases.coco_official, cases.coco_one):
        parsed.clear()
        folder = DataFolder(tmp_path / layout.__name__)
        folder.read("train")
        folder.read("val")
        assert len(parsed) == len(set(parsed)) == (2 if layout is cases.coco_official else 1)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        DataFolder(tmp_path / "nowhere").read("train")
    cases.pictures(tmp_path / "bare", [1, 2])
    with pytest.raises(DataError, match=r"no annotations that were recognised \(2 images in 1 folders\): give a COCO"):
        DataFolder(tmp_path / "bare").read("train")
    with pytest.raises(UserError, match=r"no data was named: add data\.root=FOLDER"):
        DataFolder().read("train")
    cases.coco_roboflow(tmp_path / "set")
    with pytest.raises(UserError, match=r"no split 'tset': it has test, train, val; set data\.val_split"):
        DataFolder(tmp_path / "set", val_split="tset").read("val")
    cases.coco(tmp_path / "test" / "_annotations.coco.json", cases.TEST)
    cases.pictures(tmp_path / "test", cases.TEST)
    alone = DataFolder(tmp_path / "test", val_split="all")
    assert cases.indices_of(alone.read("val")) == set(cases.TEST)  # a set to evaluate on needs no splits
    assert cases.indices_of(DataFolder(tmp_path / "set", val_split="test").read("val")) == set(cases.TEST)
    cases.coco_roboflow_train_only(tmp_path / "one")
    assert cases.indices_of(DataFolder(tmp_path / "one", val_split="all").read("val")) == set(cases.EVERY)


def test_a_split_that_the_yaml_names_but_nobody_has_is_made_and_said(tmp_path: Path) -> None:
    cases.yolo_usual(tmp_path)
    cases.write(tmp_path / "data.yaml", f"train: images/train\nval: images/vla\n{cases.NAMES}")
    folder = DataFolder(tmp_path)
    assert cases.indices_of(folder.read("val")) < set(cases.TRAIN)
    assert "val: images/vla does not exist and is left out" in folder.found.notes


def module_of(*overrides: str):
    module = build(compose_command("train", ["data.num_workers=0", *overrides]).data.module)
    module.setup("fit")
    return module


def test_what_was_found_is_told_in_a_few_lines(tmp_path: Path) -> None:
    cases.coco_roboflow_train_only(tmp_path)
    text = describe(module_of("data=auto", f"data.root={tmp_path}", "data.batch_size=2"))
    assert len(text.splitlines()) <= 8 and "python" not in text
    for words in (
        f"COCO json (train/_annotations.coco.json) in {tmp_path}", "classes (2): apple 3, pear 6",
        "7 images, 9 boxes", "2 images, 3 boxes, held out of the training images", "data.val_share=0.2",
        "short edge 640, long edge at most 1066; data.size=640",
    ):  # fmt: skip
        assert words in text, text
    assert describe(module_of("data=shapes", "data.train_images=4", "data.val_images=2")) == ""


def test_the_number_of_classes_is_that_of_the_data(tmp_path: Path) -> None:
    cases.voc_flat(tmp_path)
    config = compose_command("train", ["data=auto", f"data.root={tmp_path}"]).data
    assert config.num_classes is None
    module = build(config.module)
    module.setup("fit")
    assert module.num_classes == 2
    with pytest.raises(UserError, match=r"2 categories but num_classes is 3: set data\.num_classes=2"):
        module_of("data=auto", f"data.root={tmp_path}", "data.num_classes=3")


@pytest.mark.parametrize(
    ("size", "expected"), [(64, (64, 102)), ([48, 96], (48, 96)), (400, (400, 640)), (None, (50, 80)), (60, (60, 96))]
)
def test_a_size_is_the_short_edge_or_exact(size: int | list[int] | None, expected: tuple[int, int]) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    sample = Sample(torch.zeros(3, 100, 160, dtype=torch.uint8), Target(torch.zeros(0, 4), none, none.bool()))
    assert tuple(resizing(50, 80, size=size)(sample, torch.Generator()).image.shape[1:]) == expected  # type: ignore[arg-type]


def test_a_size_limits_the_long_edge() -> None:
    assert resizing(800, 1333, size=480).max_size == 800  # type: ignore[union-attr]


@pytest.mark.parametrize("data", ["auto", "coco", "voc", "yolo"])
def test_one_key_sets_the_size_of_training_and_validation(data: str) -> None:
    config = compose_command("train", [f"data={data}", "data.root=x", "data.size=[48,96]"]).data
    parts = (config.module.train_transform[0], config.module.val_transform[0])
    assert [build(part).size for part in parts] == [(48, 96)] * 2
    for config.size in ([1, 2, 3], "large", 2.5, 0):
        for part in parts:
            with pytest.raises(UserError, match="size"):
                build(part)


def test_categories_of_all_splits_agree(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """VOC has no list of classes: a class that only validation shows is one of training as well."""
    cases.voc_roboflow(tmp_path)
    text = (tmp_path / "valid" / "shot06.xml").read_text().replace("pear", "quince")
    (tmp_path / "valid" / "shot06.xml").write_text(text)
    folder = DataFolder(tmp_path)
    with caplog.at_level(logging.WARNING):
        parts = [folder.read("train"), folder.read("val")]
    assert [[item.name for item in part.categories] for part in parts] == [["apple", "pear", "quince"]] * 2
    ids = [record.image_id for part in parts for record in part.records]
    assert len(set(ids)) == len(ids)


def paths_of(folder: DataFolder, part: Literal["train", "val"]) -> list[str]:
    root = folder.root
    assert root is not None
    return [record.path.relative_to(root).as_posix() for record in folder.read(part).records]


@pytest.mark.parametrize("folders", [("annotations/{}", "images/{}"), ("Data/{}/xml", "Data/{}/jpg"), ("{}/a", "{}/b")])
def test_images_of_one_name_stay_in_their_split(folders: tuple[str, str], tmp_path: Path) -> None:
    for split, count in (("train", 5), ("val", 2)):
        cases.pages(tmp_path / folders[0].format(split), range(count))
        cases.pictures(tmp_path / folders[1].format(split), range(count))
    for split, count in (("train", 5), ("val", 2)):
        expected = [f"{folders[1].format(split)}/{cases.stem(index)}.jpg" for index in range(count)]
        assert paths_of(DataFolder(tmp_path), split) == expected  # type: ignore[arg-type]
    (tmp_path / folders[1].format("val") / f"{cases.stem(1)}.jpg").unlink()
    with pytest.raises(DataError, match=r"shot01\.xml has no image"):
        DataFolder(tmp_path).read("val")


def test_lists_of_voc_name_folders(tmp_path: Path) -> None:
    for camera in ("a", "b"):
        cases.pictures(tmp_path / "JPEGImages" / camera, range(3))
        cases.pages(tmp_path / "Annotations" / camera, range(3))
    sets = tmp_path / "ImageSets" / "Main"
    cases.write(sets / "train.txt", "a/shot00\na/shot01\na/shot02\n")
    cases.write(sets / "val.txt", "b/shot00\nJPEGImages/b/shot01.jpg\n")
    assert paths_of(DataFolder(tmp_path), "val") == ["JPEGImages/b/shot00.jpg", "JPEGImages/b/shot01.jpg"]
    cases.write(sets / "val.txt", "shot02\n")
    with pytest.raises(
        DataError, match=r"'shot02', which could be .*a/shot02\.xml or .*b/shot02\.xml: write its folder"
    ):
        DataFolder(tmp_path).read("val")


def test_photos_are_told_from_copies_of_another_kind(tmp_path: Path) -> None:
    cases.pages(tmp_path / "xml", range(4))
    for name in ("Photos", "Depth"):
        cases.pictures(tmp_path / name, range(4))
    assert {path.split("/")[0] for path in paths_of(DataFolder(tmp_path), "train")} == {"Photos"}
    cases.pictures(tmp_path / "Others", range(4))
    with pytest.raises(DataError, match=r"in Others/ or Photos/: say which folder by data\.train_images=FOLDER"):
        DataFolder(tmp_path).read("train")
    folder = DataFolder(tmp_path, train_images=tmp_path / "Others", format="voc")
    assert {path.split("/")[0] for path in paths_of(folder, "train")} == {"Others"}


def test_a_missing_image_does_not_change_the_folder(tmp_path: Path) -> None:
    cases.coco(tmp_path / "set.json", range(10), lambda i: f"cam{i // 5}/{i % 5}.jpg")
    for index in range(9):
        cases.image(tmp_path / f"cam{index // 5}" / f"{index % 5}.jpg")
    folder = DataFolder(tmp_path, train_split="all", val_split="all")
    assert paths_of(folder, "train") == [f"cam{index // 5}/{index % 5}.jpg" for index in range(10)]
    for index in (5, 6, 7):
        (tmp_path / "cam1" / f"{index % 5}.jpg").unlink()
    with pytest.raises(DataError, match=r"4 of its 10 images are missing, e\.g\. 'cam1/0\.jpg'"):
        DataFolder(tmp_path).read("train")


def test_images_of_another_split_are_never_read(tmp_path: Path) -> None:
    for split in ("train", "val"):
        cases.coco(tmp_path / f"{split}.json", range(5))
    cases.pictures(tmp_path / "images" / "train", range(5))
    with pytest.raises(DataError, match=r"val\.json names images such as .*data\.val_images"):
        DataFolder(tmp_path).read("val")


def test_most_of_validation_in_training_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cases.coco(tmp_path / "train.json", range(6))
    cases.coco(tmp_path / "val.json", range(3, 9))
    cases.pictures(tmp_path / "images", range(9))
    DataFolder(tmp_path).read("val")
    assert len({*paths_of(DataFolder(tmp_path), "train")}) == 6
    folder = DataFolder(tmp_path)
    assert [len(folder.read(part).records) for part in ("train", "val")] == [6, 6]  # a half may be
    cases.coco(tmp_path / "val.json", range(2, 7))
    folder = DataFolder(tmp_path)
    folder.read("train")
    assert "validation images are" not in caplog.text
    folder.read("val")
    assert "4 of 5 validation images are training images" in caplog.text
    cases.yolo_usual(tmp_path / "coco128")
    cases.write(tmp_path / "coco128" / "data.yaml", f"train: images/train\nval: images/train\n{cases.NAMES}")
    folder = DataFolder(tmp_path / "coco128")
    assert len(folder.read("train").records) == len(folder.read("val").records) == 6
    assert "6 of 6 validation images are training images" in caplog.text


@pytest.mark.parametrize("name", ["trainval", "annotations"])
def test_what_is_no_split_trains_beside_others(name: str, tmp_path: Path) -> None:
    cases.coco(tmp_path / f"{name}.json", range(6))
    cases.coco(tmp_path / "val.json", range(6, 9))
    cases.pictures(tmp_path / "images", range(9))
    folder = DataFolder(tmp_path)
    assert [cases.indices_of(folder.read(part)) for part in ("train", "val")] == [set(range(6)), {6, 7, 8}]
    (tmp_path / "val.json").rename(tmp_path / "test.json")
    for split in ("train", "trainval"):
        folder = DataFolder(tmp_path, train_split=split, val_split="test")
        assert [cases.indices_of(folder.read(part)) for part in ("train", "val")] == [set(range(6)), {6, 7, 8}]
    folder = DataFolder(tmp_path)
    assert cases.indices_of(folder.read("train")) | cases.indices_of(folder.read("val")) == set(range(6))


def test_voc_trainval_is_called_by_its_name(tmp_path: Path) -> None:
    cases.pictures(tmp_path / "JPEGImages", range(6))
    cases.pages(tmp_path / "Annotations", range(6))
    for split, indices in (("trainval", range(4)), ("test", (4, 5)), ("apple_trainval", range(4))):
        cases.write(tmp_path / f"ImageSets/Main/{split}.txt", "".join(f"{cases.stem(i)}\n" for i in indices))
    folder = DataFolder(tmp_path, train_split="trainval", val_split="test")
    assert [cases.indices_of(folder.read(part)) for part in ("train", "val")] == [{0, 1, 2, 3}, {4, 5}]
    assert set(folder.found.splits) == {"train", "test"}


def test_classes_kept_do_not_change_who_validates(tmp_path: Path) -> None:
    cases.coco_one(tmp_path)
    sides = [cases.indices_of(DataFolder(tmp_path, classes=classes).read("val")) for classes in (None, ["pear"])]
    assert sides[0] == sides[1]


@pytest.mark.parametrize("order", [("apple\npear\n", "pear\napple\n"), ("apple\npear\n", "apple\n")])
def test_class_files_of_folders_must_agree(order: tuple[str, str], tmp_path: Path) -> None:
    for split, text, indices in zip(("train", "val"), order, (cases.TRAIN, cases.VAL), strict=True):
        cases.pictures(tmp_path / split, indices)
        cases.texts(tmp_path / split, indices)
        cases.write(tmp_path / split / "classes.txt", text)
    if order[1].startswith("pear"):
        with pytest.raises(UserError, match=r"train/classes\.txt and val/classes\.txt .* order classes differently"):
            DataFolder(tmp_path).read("train")
    else:
        assert [item.name for item in DataFolder(tmp_path).read("val").categories] == ["apple", "pear"]


def test_devices_and_pipes_are_not_read(tmp_path: Path) -> None:
    cases.yolo_usual(tmp_path)
    os.mkfifo(tmp_path / "images" / "train" / "pipe.jpg")
    (tmp_path / "classes.txt").symlink_to("/dev/zero")
    (tmp_path / "other.yaml").symlink_to("/dev/zero")
    assert cases.indices_of(DataFolder(tmp_path).read("train")) == set(cases.TRAIN)
    label = tmp_path / "labels" / "train" / "shot01.txt"
    label.unlink()
    label.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"shot01\.txt cannot be read as text \(it is no plain file\)"):
        DataFolder(tmp_path).read("train")


@pytest.mark.parametrize(("text", "words"), [
    ("names: {0: cat, 1: dog\ntrain: images\nval: images\n", r"data\.yaml is not valid yaml \(line \d"),
    ('names: [cat]\ntrain: "C:\\Users\\me\\images"\n', r"line 2: .*write \\ as / in paths"),
])  # fmt: skip
def test_a_broken_yaml_is_said_and_never_passed_over(tmp_path: Path, text: str, words: str) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for name in ("a", "b", "c"):
        Image.new("RGB", (40, 30)).save(tmp_path / "images" / f"{name}.jpg")
        (tmp_path / "labels" / f"{name}.TXT").write_text("0 0.5 0.5 0.2 0.2\n")
    assert len(DataFolder(tmp_path).read("train")[0].target.boxes) == 1  # without a yaml, of label files in capitals
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=words):
        DataFolder(tmp_path).read("train")


def test_what_a_folder_lacks_is_said(tmp_path: Path) -> None:
    (tmp_path / "set.zip").touch()
    with pytest.raises(DataError, match=r"1 \.zip in 1 folders\): unpack the \.zip, or give"):
        DataFolder(tmp_path).read("train")
    (tmp_path / "a.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(DataError, match=r'a\.json lacks "categories"\. Give a COCO json'):
        DataFolder(tmp_path).read("train")


def test_a_user_that_is_none_is_said() -> None:
    with pytest.raises(UserError, match="no such user's folder"):
        DataFolder("~nobody-of-this-name/data")
