"""One small set in every layout that is recognised. Run as a script it writes docs/layouts.md, what became of each."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dyndet.data.layouts.folder import DataFolder
from dyndet.data.records import FileDataset

CLASSES = ("apple", "pear")
WIDTH, HEIGHT = 80, 50
Box = tuple[int, int, int, int, int]  # x1 y1 x2 y2 class


def boxes_of(index: int) -> list[Box]:
    """Other boxes in every image; image 5 has none of class 0."""
    first = (4 + index, 6, 24 + index, 30, index % 2)
    return [first] if index % 3 else [first, (40, 10 + index, 70, 40, 1)]


def stem(index: int) -> str:
    return f"shot{index:02d}"


TRAIN, VAL, TEST = range(6), range(6, 9), range(9, 11)
EVERY = (*TRAIN, *VAL)


def image(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), (90, 120, 60)).save(file)


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def coco(
    file: Path, indices: Iterable[int], name: Callable[[int], str] = lambda i: f"{stem(i)}.jpg", first: int = 1
) -> None:
    """`first`: the id of the first class; 0 has a category of the set's name before them, as Roboflow writes it."""
    indices = list(indices)
    categories = [
        {"id": k + max(first, 1), "name": n, "supercategory": "fruit" if not first else "none"}
        for k, n in enumerate(CLASSES)
    ]
    if not first:
        categories.insert(0, {"id": 0, "name": "fruit", "supercategory": "none"})
    images = [{"id": i, "file_name": name(i), "width": WIDTH, "height": HEIGHT} for i in indices]
    annotations = []
    for i in indices:
        for x1, y1, x2, y2, c in boxes_of(i):
            box = [x1, y1, x2 - x1, y2 - y1]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": c + max(first, 1),
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    write(file, json.dumps({"info": {}, "images": images, "annotations": annotations, "categories": categories}))


def yolo(file: Path, index: int) -> None:
    lines = []
    for x1, y1, x2, y2, c in boxes_of(index):
        numbers = ((x1 + x2) / 2 / WIDTH, (y1 + y2) / 2 / HEIGHT, (x2 - x1) / WIDTH, (y2 - y1) / HEIGHT)
        lines.append(" ".join([str(c), *(f"{number:.6f}" for number in numbers)]))
    write(file, "\n".join(lines) + "\n")


def voc(file: Path, index: int, filename: str | None = None) -> None:
    objects = "".join(
        f"<object><name>{CLASSES[c]}</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
        "</bndbox></object>"
        for x1, y1, x2, y2, c in boxes_of(index)
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    write(file, f"<annotation><filename>{filename or f'{stem(index)}.jpg'}</filename>{size}{objects}</annotation>")


def pictures(folder: Path, indices: Iterable[int]) -> None:
    for i in indices:
        image(folder / f"{stem(i)}.jpg")


def texts(folder: Path, indices: Iterable[int]) -> None:
    for i in indices:
        yolo(folder / f"{stem(i)}.txt", i)


def pages(folder: Path, indices: Iterable[int]) -> None:
    for i in indices:
        voc(folder / f"{stem(i)}.xml", i)


NAMES = f"names: [{', '.join(CLASSES)}]\n"


def coco_official(root: Path) -> None:
    for split, indices in (("train2017", TRAIN), ("val2017", VAL)):
        coco(root / "annotations" / f"instances_{split}.json", indices)
        pictures(root / split, indices)
    write(
        root / "annotations" / "captions_train2017.json",
        json.dumps({"images": [], "annotations": [], "categories": []}),
    )


def coco_named(root: Path) -> None:
    for split, indices in (("train", TRAIN), ("val", VAL)):
        coco(root / "annotations" / f"fruit_{split}_v2.json", indices)
        pictures(root / "images" / split, indices)


def coco_one_folder(root: Path) -> None:
    coco(root / "annotations" / "train.json", TRAIN)
    coco(root / "annotations" / "validation.json", VAL)
    pictures(root / "images", EVERY)


def coco_roboflow(root: Path) -> None:
    for split, indices in (("train", TRAIN), ("valid", VAL), ("test", TEST)):
        coco(root / split / "_annotations.coco.json", indices, first=0)
        pictures(root / split, indices)
    write(root / "README.roboflow.txt", "fruit - v1\n")


def coco_roboflow_train_only(root: Path) -> None:
    coco(root / "train" / "_annotations.coco.json", EVERY, first=0)
    pictures(root / "train", EVERY)


def coco_cvat(root: Path) -> None:
    coco(root / "annotations" / "instances_default.json", EVERY)
    pictures(root / "images" / "default", EVERY)


def coco_cvat_flat(root: Path) -> None:
    coco(root / "annotations" / "instances_default.json", EVERY)
    pictures(root / "images", EVERY)


def coco_label_studio(root: Path) -> None:
    coco(root / "result.json", EVERY, lambda i: f"images\\{stem(i)}.jpg", first=2)
    pictures(root / "images", EVERY)


def coco_uploads(root: Path) -> None:
    coco(root / "result.json", EVERY, lambda i: f"/label-studio/data/media/upload/3/{stem(i)}.jpg")
    pictures(root / "images", EVERY)


def coco_one(root: Path) -> None:
    coco(root / "labels.json", EVERY)
    pictures(root / "photos", EVERY)


def coco_beside(root: Path) -> None:
    coco(root / "fruit.json", EVERY)
    pictures(root, EVERY)


def yolo_usual(root: Path) -> None:
    for split, indices in (("train", TRAIN), ("val", VAL)):
        pictures(root / "images" / split, indices)
        texts(root / "labels" / split, indices)
    write(root / "data.yaml", f"train: images/train\nval: images/val\n{NAMES}")


def yolo_roboflow(root: Path) -> None:
    for split, indices in (("train", TRAIN), ("valid", VAL), ("test", TEST)):
        pictures(root / split / "images", indices)
        texts(root / split / "labels", indices)
    paths = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n"
    write(root / "data.yaml", f"{paths}nc: 2\n{NAMES}")


def yolo_several(root: Path) -> None:
    for folder, indices in (("monday", (0, 1, 2)), ("tuesday", (3, 4, 5)), ("friday", VAL)):
        pictures(root / folder / "images", indices)
        texts(root / folder / "labels", indices)
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(CLASSES))
    write(root / "fruit.yaml", f"train:\n- monday/images\n- tuesday/images\nvalidation: friday/images\nnames:\n{names}")


def yolo_listed(root: Path) -> None:
    pictures(root / "images", EVERY)
    texts(root / "labels", EVERY)
    for split, indices in (("train", TRAIN), ("val", VAL)):
        write(root / f"{split}.txt", "".join(f"/home/somebody/fruit/images/{stem(i)}.jpg\n" for i in indices))
    write(root / "data.yaml", f"train: train.txt\nval: val.txt\n{NAMES}")


def yolo_other_machine(root: Path) -> None:
    yolo_usual(root)
    write(root / "data.yaml", f"path: /home/somebody/fruit\ntrain: images/train\nval: images/val\n{NAMES}")


def yolo_absolute(root: Path) -> None:
    yolo_usual(root)
    write(root / "data.yaml", f"train: {root}/images/train\nval: C:\\data\\fruit\\images\\val\n{NAMES}")


def yolo_no_val(root: Path) -> None:
    pictures(root / "images", EVERY)
    texts(root / "labels", EVERY)
    write(root / "data.yaml", f"train: images\nval:\n{NAMES}")


def yolo_without_yaml(root: Path) -> None:
    yolo_usual(root)
    (root / "data.yaml").unlink()
    write(root / "classes.txt", "\n".join(CLASSES) + "\n")


def yolo_two_folders(root: Path) -> None:
    pictures(root / "images", EVERY)
    texts(root / "labels", EVERY)
    write(root / "classes.txt", "\n".join(CLASSES))


def yolo_split_first(root: Path) -> None:
    for split, indices in (("train", TRAIN), ("val", VAL)):
        pictures(root / split / "images", indices)
        texts(root / split / "labels", indices)
    write(root / "obj.names", "\n".join(CLASSES))


def yolo_beside(root: Path) -> None:
    pictures(root, EVERY)
    texts(root, EVERY)
    write(root / "classes.txt", "\n".join(CLASSES))


def yolo_darknet(root: Path) -> None:
    pictures(root / "obj_train_data", EVERY)
    texts(root / "obj_train_data", EVERY)
    write(root / "obj.names", "\n".join(CLASSES))
    write(root / "obj.data", "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n")
    write(root / "train.txt", "".join(f"data/obj_train_data/{stem(i)}.jpg\n" for i in EVERY))


def yolo_darknet_lists(root: Path) -> None:
    pictures(root / "data", EVERY)
    texts(root / "data", EVERY)
    write(root / "obj.names", "\n".join(CLASSES))
    for split, indices in (("train", TRAIN), ("valid", VAL)):
        write(root / f"{split}.txt", "".join(f"data/{stem(i)}.jpg\n" for i in indices))


def yolo_nameless(root: Path) -> None:
    pictures(root / "images", EVERY)
    texts(root / "labels", EVERY)


def voc_official(root: Path) -> None:
    pictures(root / "JPEGImages", (*EVERY, *TEST))
    pages(root / "Annotations", (*EVERY, *TEST))
    for split, indices in (("train", TRAIN), ("val", VAL), ("trainval", EVERY), ("test", TEST), ("apple_train", TRAIN)):
        write(root / "ImageSets" / "Main" / f"{split}.txt", "".join(f"{stem(i)}\n" for i in indices))


def voc_without_sets(root: Path) -> None:
    pictures(root / "JPEGImages", EVERY)
    pages(root / "Annotations", EVERY)


def voc_cvat(root: Path) -> None:
    voc_without_sets(root)
    write(root / "ImageSets" / "Main" / "default.txt", "".join(f"{stem(i)}\n" for i in EVERY))


def voc_lower_case(root: Path) -> None:
    pictures(root / "images", EVERY)
    pages(root / "annots", EVERY)


def voc_flat(root: Path) -> None:
    pictures(root, EVERY)
    pages(root, EVERY)


def voc_roboflow(root: Path) -> None:
    for split, indices in (("train", TRAIN), ("valid", VAL), ("test", TEST)):
        pictures(root / split, indices)
        pages(root / split, indices)


def voc_split_folders(root: Path) -> None:
    for split, indices in (("train", TRAIN), ("val", VAL)):
        pictures(root / split / "images", indices)
        pages(root / split / "annotations", indices)


def voc_by_file_name(root: Path) -> None:
    pictures(root / "images", EVERY)
    for i in EVERY:
        voc(root / "xml" / f"{i}.xml", i, f"C:\\photos\\{stem(i)}.jpg")


@dataclass(frozen=True)
class Case:
    """A layout: how it is called, who writes it, what has to come out."""

    name: str
    build: Callable[[Path], None]
    format: str
    splits: bool = True  # whether the folder says which images validate
    classes: tuple[str, ...] = CLASSES


CASES = [
    Case("COCO as published", coco_official, "coco"),
    Case("any json with train or val in its name", coco_named, "coco"),
    Case("two jsons, one folder of images", coco_one_folder, "coco"),
    Case("Roboflow COCO", coco_roboflow, "coco"),
    Case("Roboflow COCO, training images alone", coco_roboflow_train_only, "coco", False),
    Case("CVAT COCO", coco_cvat, "coco", False),
    Case("CVAT COCO, images without subset", coco_cvat_flat, "coco", False),
    Case("Label Studio COCO (`images\\x.jpg`)", coco_label_studio, "coco", False),
    Case("Label Studio COCO (names of its server)", coco_uploads, "coco", False),
    Case("one json, one folder of images", coco_one, "coco", False),
    Case("json beside the images", coco_beside, "coco", False),
    Case("YOLO yaml, relative paths", yolo_usual, "yolo"),
    Case("Roboflow YOLO (`../train/images`)", yolo_roboflow, "yolo"),
    Case("YOLO yaml, several folders per split", yolo_several, "yolo"),
    Case("YOLO yaml, text files made elsewhere", yolo_listed, "yolo"),
    Case("YOLO yaml, `path` of another machine", yolo_other_machine, "yolo"),
    Case("YOLO yaml, absolute paths", yolo_absolute, "yolo"),
    Case("YOLO yaml without validation", yolo_no_val, "yolo", False),
    Case("YOLO without a yaml, split folders", yolo_without_yaml, "yolo"),
    Case("YOLO without a yaml, two folders", yolo_two_folders, "yolo", False),
    Case("YOLO without a yaml, split first", yolo_split_first, "yolo"),
    Case("YOLO texts beside the images", yolo_beside, "yolo", False),
    Case("YOLO texts without class names", yolo_nameless, "yolo", False, ("0", "1")),
    Case("darknet (CVAT YOLO 1.1)", yolo_darknet, "yolo", False),
    Case("darknet lists without obj.data", yolo_darknet_lists, "yolo"),
    Case("VOC as published", voc_official, "voc"),
    Case("VOC without ImageSets", voc_without_sets, "voc", False),
    Case("CVAT VOC", voc_cvat, "voc", False),
    Case("VOC xml and images in folders of other names", voc_lower_case, "voc", False),
    Case("VOC xml beside the images", voc_flat, "voc", False),
    Case("Roboflow VOC", voc_roboflow, "voc"),
    Case("VOC in split folders", voc_split_folders, "voc"),
    Case("VOC xml that names its image", voc_by_file_name, "voc", False),
]


@dataclass
class Outcome:
    """What became of a layout."""

    layout: str
    recognised: bool
    classes: bool
    splits: bool
    boxes: bool

    @property
    def good(self) -> bool:
        return self.recognised and self.classes and self.splits and self.boxes


def try_layout(case: Case, root: Path) -> Outcome:
    """Builds a layout and reads it as `data=auto` does."""
    case.build(root)
    folder = DataFolder(root)
    found = folder.found
    train, val = folder.read("train"), folder.read("val")
    sides = [indices_of(train), indices_of(val)]
    if case.splits:
        splits = sides == [set(TRAIN), set(VAL)]
    else:
        splits = (
            folder.share == 0.2 and sides[0] | sides[1] == set(EVERY) and not sides[0] & sides[1] and len(sides[1]) == 2
        )
    return Outcome(
        found.layout.replace(str(root), "FOLDER"),
        found.format == case.format,
        [[item.name for item in part.categories] for part in (train, val)] == [list(case.classes)] * 2,
        splits,
        equal_to_source(train) and equal_to_source(val),
    )


def indices_of(dataset: FileDataset) -> set[int]:
    return {int(record.path.stem[-2:]) for record in dataset.records}


def equal_to_source(dataset: FileDataset) -> bool:
    for record in dataset.records:
        source = boxes_of(int(record.path.stem[-2:]))
        if record.labels.tolist() != [box[4] for box in source] or not record.path.is_file():
            return False
        if abs(record.boxes - [box[:4] for box in source]).max() > 1e-3:
            return False
    return True


def drawn(root: Path) -> str:
    """The files of a folder, those of a kind in one."""
    shown: dict[str, None] = {}
    for folder, _, names in sorted(os.walk(root)):
        for name in sorted(names):
            kind = f"*{Path(name).suffix}" if Path(name).stem.startswith("shot") or Path(name).stem.isdigit() else name
            shown[(Path(folder) / kind).relative_to(root).as_posix()] = None
    return ", ".join(f"`{name}`" for name in shown)


def table(folder: Path) -> str:
    rows = []
    for number, case in enumerate(CASES):
        root = folder / f"{number:02d}"
        outcome = try_layout(case, root)
        ticks = [
            "yes" if good else "NO" for good in (outcome.recognised, outcome.classes, outcome.splits, outcome.boxes)
        ]
        splits = ticks[2] if case.splits else f"{ticks[2]}, made here"
        cells = [case.name.replace("\\", "\\\\"), drawn(root), outcome.layout, ticks[0], ticks[1], splits, ticks[3]]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([HEAD, *rows, ""])


HEAD = """\
# Layouts of data sets

`python -m dyndet.train data=auto data.root=FOLDER` recognises the folders below. Written by
`python tests/data/layout_cases.py`: the same images and boxes in every layout, read by what `data=auto` uses. "Made
here": the folder has no validation split, so a fixed fifth of the images validates (`data.val_share`).

| layout | files | recognised as | format | classes | splits | boxes equal |
| --- | --- | --- | --- | --- | --- | --- |"""

if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "docs" / "layouts.md"
    with tempfile.TemporaryDirectory() as scratch:
        out.write_text(table(Path(scratch)))
