from __future__ import annotations

import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from PIL import Image

from dyndet.data.voc import VocDataset
from dyndet.errors import DataError

BOX = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>39.5</ymax></bndbox>"
SIZE = "<size><width>60</width><height>40</height><depth>3</depth></size>"


def item(name: str, box: str = BOX, extra: str = "") -> str:
    return f"<object><name>{name}</name>{extra}{box}</object>"


def page(*objects: str, size: str = SIZE, head: str = "") -> str:
    return f"{head}<annotation><filename>/elsewhere/wrong.jpg</filename>{size}{''.join(objects)}</annotation>"


def write(root: Path, pages: dict[str, str], splits: dict[str, str], suffix: str = ".jpg") -> Path:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for stem, text in pages.items():
        (root / "Annotations" / f"{stem}.xml").write_text(text)
        Image.new("RGB", (60, 40)).save(root / "JPEGImages" / f"{stem}{suffix}")
    for name, text in splits.items():
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text(text)
    return root


PAGES = {
    "b": page(item("dog"), item("cat", extra="<difficult>1</difficult>")),
    "a": page(item(" ant ")),
    "c": page(),
}
SPLITS = {"train": "c\nb\n\n", "val": "a\n", "blank": "\n\n"}


def test_splits_agree_on_classes_and_image_ids(tmp_path: Path) -> None:
    root = write(tmp_path, PAGES, SPLITS)
    train, val = VocDataset(root), VocDataset(str(root), split="val")
    assert train.categories == val.categories
    assert [(category.id, category.name) for category in train.categories] == [(1, "ant"), (2, "cat"), (3, "dog")]
    assert [train[i].target.image_id for i in range(2)] == [3, 2]  # in the order of the list
    assert val[0].target.image_id == 1
    target = train[1].target
    assert target.boxes.tolist() == [[1, 2, 30, 39.5]] * 2  # as written: no +1, no -1
    assert target.labels.tolist() == [2, 1]
    assert train[0].target.boxes.shape == (0, 4)


def test_images_without_objects_can_be_left_out(tmp_path: Path) -> None:
    root = write(tmp_path, PAGES, SPLITS)
    assert [len(VocDataset(root, skip_empty=skip)) for skip in (False, True)] == [2, 1]
    assert VocDataset(root, skip_empty=True)[0].target.image_id == 2  # ids stay


@pytest.mark.parametrize("text", ["", "Unspecified", "0", "false", "True", "1"])
def test_difficult_as_tools_write_it(text: str, tmp_path: Path) -> None:
    root = write(tmp_path, {"a": page(item("cat", extra=f"<difficult>{text}</difficult>"))}, {"train": "a"})
    assert VocDataset(root).records[0].crowd.tolist() == [text in ("True", "1")]


def test_difficult_objects_are_crowd_or_left_out(tmp_path: Path) -> None:
    root = write(tmp_path, PAGES, SPLITS)
    assert VocDataset(root)[1].target.crowd.tolist() == [False, True]
    without = VocDataset(root, keep_difficult=False)
    assert without[1].target.labels.tolist() == [2]
    assert [category.name for category in without.categories] == ["ant", "cat", "dog"]


def test_classes_choose_order_and_warn_about_typos(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = VocDataset(write(tmp_path, PAGES, SPLITS), classes=["dog", "ant"])
    assert [category.name for category in dataset.categories] == ["dog", "ant"]
    assert dataset[1].target.labels.tolist() == [0]
    assert not caplog.messages
    VocDataset(tmp_path, classes=["dog", "antt"])
    assert "['antt']" in caplog.text


def test_other_suffixes_parts_and_missing_sizes(tmp_path: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>0</xmin><ymin>0</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>"
    pages = {"a": page(item("dog", extra=part), size=""), "b": page(size=SIZE.replace("60", "0"))}
    dataset = VocDataset(write(tmp_path, pages, {"train": "a\nb"}, suffix=".PNG"))
    assert dataset[0].target.boxes.tolist() == [[1, 2, 30, 39.5]]
    assert dataset[0].target.path.endswith("a.PNG")
    assert dataset.sizes == [(40, 60), (40, 60)]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (("30", "1"), "zero-size"),
        (("30", "0.5"), "inverted"),
        (("30", "nan"), "non-finite"),
        (("30", "inf"), "non-finite"),
        (("30", "61"), "clipped"),
        (("<ymin>2<", "<ymin>-2<"), "clipped"),
        (("<ymin>2<", "<ymin>-2<"), "clipped"),
    ],
)
def test_bad_boxes_are_mended_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: tuple[str, str], kind: str
) -> None:
    dataset = VocDataset(write(tmp_path, {"a": page(item("dog"), item("cat", BOX.replace(*change)))}, {"train": "a"}))
    assert dataset.repairs.counts == {kind: 1}
    assert len(dataset[0].target.boxes) == 1 + (kind == "clipped")
    assert "a.xml object 2" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid xml"),
        ("<annotation>", "not valid xml"),
        ("{}", "not valid xml"),
        (page(item("")), r"object 1 \(\) has no name"),
        (page(item("dog"), item("dog", "")), r"object 2 \(dog\) has bndbox/xmin None"),
        (page(item("dog", BOX.replace("30", "wide"))), r"object 1 \(dog\) has bndbox/xmax 'wide'"),
        (page(size=SIZE.replace("60", "wide")), "size/width 'wide'"),
        (page(size=SIZE.replace("60", "61")), "is for an image of 40 x 61 pixels"),
        (page(size=SIZE.replace("60", "nan")), "is for an image of 40 x nan pixels"),
    ],
)
def test_malformed_xml_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        VocDataset(write(tmp_path, {"broken": text}, {"train": "broken"}))
    assert "broken.xml" in str(caught.value)


BOMB = "<!DOCTYPE bomb [<!ENTITY a0 'lol'>" + "".join(f"<!ENTITY a{i} '{f'&a{i - 1};' * 10}'>" for i in range(1, 12))
EXTERNAL = "<!DOCTYPE x [<!ENTITY secret SYSTEM 'file:///etc/hostname'>"


@pytest.mark.parametrize(("head", "entity"), [(BOMB, "&a11;"), (EXTERNAL, "&secret;"), (BOMB, ""), (EXTERNAL, "")])
def test_entities_are_refused_quickly(tmp_path: Path, head: str, entity: str) -> None:
    root = write(tmp_path, {"a": page(item("dog" + entity), head=head + "]>")}, {"train": "a"})
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"a\.xml holds a DTD or entities"):
        VocDataset(root)
    assert time.perf_counter() - start < 1


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.txt does not exist: .* none"):
        VocDataset(tmp_path)
    root = write(tmp_path, PAGES, SPLITS | {"gone": "zebra\n", "twice": "a\nb\na\n"})
    with pytest.raises(DataError, match=r"tset\.txt does not exist: .*blank, gone, train, twice, val"):
        VocDataset(root, split="tset")
    with pytest.raises(DataError, match=r"blank\.txt has no images"):
        VocDataset(root, split="blank")
    with pytest.raises(DataError, match=r"gone\.txt names 'zebra'"):
        VocDataset(root, split="gone")
    with pytest.raises(DataError, match=r"twice\.txt names 'a' twice"):
        VocDataset(root, split="twice")
    (root / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"a\.jpg does not exist"):
        VocDataset(root, split="val")


@pytest.mark.parametrize("name", ["../outside", "../../outside", "/etc/passwd", "..\\outside", "a\0b"])
def test_names_cannot_leave_the_set(tmp_path: Path, name: str) -> None:
    root = write(tmp_path / "set", PAGES, {"train": name})
    write(tmp_path, {"outside": page()}, {})
    with pytest.raises(DataError, match="Annotations has no such xml"):
        VocDataset(root)
    with pytest.raises(DataError, match=r"does not lie inside|does not exist"):
        VocDataset(root, split=name)


def test_images_may_lie_on_another_disk(tmp_path: Path) -> None:
    root = write(tmp_path / "set", PAGES, SPLITS)
    (root / "JPEGImages").rename(tmp_path / "disk")
    (root / "JPEGImages").symlink_to(tmp_path / "disk")
    assert VocDataset(root, split="val")[0].image.shape == (3, 40, 60)


@pytest.mark.data
@pytest.mark.parametrize(("split", "images", "zero"), [("train", 13, 1), ("val", 6, 0), ("test", 6, 0)])
def test_real_set_agrees_with_the_raw_xml(shared_data: Path, split: str, images: int, zero: int) -> None:
    root = shared_data / "bccd_voc"
    dataset = VocDataset(root, split=split)
    assert [category.name for category in dataset.categories] == ["Platelets", "RBC", "WBC"]
    assert len(dataset) == images
    assert dataset.repairs.counts == ({"zero-size": 1} if zero else {})
    for index in range(len(dataset)):
        target = dataset[index].target
        expected = []
        for entry in ElementTree.parse(root / "Annotations" / f"{Path(target.path).stem}.xml").iter("object"):
            box = [float(entry.findtext(f"bndbox/{side}") or "") for side in ("xmin", "ymin", "xmax", "ymax")]
            if box != [504, 337, 504, 337]:
                expected.append((entry.findtext("name"), box))
        names = [dataset.categories[label].name for label in target.labels]
        assert list(zip(names, target.boxes.tolist(), strict=True)) == expected
