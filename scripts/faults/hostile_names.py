"""R16 and R17: names in data files that lead elsewhere, and xml that does more than annotate."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from dyndet.data.coco import CocoDataset
from dyndet.data.layouts.folder import DataFolder
from dyndet.data.records import FileDataset
from dyndet.data.voc import VocDataset
from dyndet.data.yolo import YoloDataset
from dyndet.errors import DataError
from faults.row import Outcome, Row

XML = "<annotation><filename>{}</filename><object><name>a</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax>" \
      "<ymax>9</ymax></bndbox></object></annotation>"  # fmt: skip


class _Opened:
    """Names of files that were opened while it is listened to; the interpreter never forgets a hook."""

    def __init__(self) -> None:
        self.names: list[str] | None = None
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "socket.connect", "socket.getaddrinfo") and self.names is not None:
            self.names.append(str(arguments[0]) if event == "open" else event)

    @contextmanager
    def heard(self) -> Iterator[list[str]]:
        self.names = names = []
        try:
            yield names
        finally:
            self.names = None


def names_of(outside: Path) -> dict[str, str]:
    """Names that would lead to `secret.jpg` outside of the set, or nowhere good."""
    secret = outside / "secret.jpg"
    return {
        "parent": "../../outside/secret.jpg",
        "parent in the middle": "sub/../../../outside/secret.jpg",
        "dots and parents": "./.././../outside/./secret.jpg",
        "absolute": str(secret),
        "double slash": f"/{secret}",
        "backslashes": "..\\..\\outside\\secret.jpg",
        "percent-encoded dots": "%2e%2e/%2e%2e/outside/secret.jpg",
        "percent-encoded slashes": "..%2f..%2foutside%2fsecret.jpg",
        "UNC": "\\\\localhost\\outside\\secret.jpg",
        "drive": f"C:{secret}",
        "url": f"file://{secret}",
        "home": "~/secret.jpg",
        "null byte": "1.jpg\0/../../../outside/secret.jpg",
        "too long": "a" * 300 + ".jpg",
        "path too long": "a/" * 3000 + "b.jpg",
        "link to a device": "device.jpg",
        "link to itself": "circle.jpg",
        "surrogate": "\udce9.jpg",
    }


def _set(folder: Path) -> tuple[Path, Path]:
    """A root with images, and what lies outside of it."""
    root, outside = folder / "root", folder / "outside"
    (root / "images").mkdir(parents=True)
    outside.mkdir()
    for file in (root / "images" / "1.jpg", outside / "secret.jpg"):
        Image.new("RGB", (30, 20)).save(file)
    (root / "images" / "device.jpg").symlink_to("/dev/zero")
    (root / "images" / "circle.jpg").symlink_to("circle.jpg")
    (outside / "secret.txt").write_text("0 .5 .5 .2 .2")
    (outside / "secret.xml").write_text(XML.format("secret.jpg"))
    return root, outside


def _coco(root: Path, name: str) -> FileDataset:
    images = [{"id": i, "file_name": file, "height": 20, "width": 30} for i, file in ((1, "1.jpg"), (2, name))]
    annotations = [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 9, 9]} for i in (1, 2)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    (root / "a.json").write_text(json.dumps(content))
    return CocoDataset(root / "a.json", root / "images")


def _yolo(root: Path, name: str) -> FileDataset:
    (root / "labels").mkdir()
    (root / "labels" / "1.txt").write_text("0 .5 .5 .2 .2")
    (root / "images" / "list.txt").write_text(f"1.jpg\n{name}\n", errors="surrogateescape")
    (root / "data.yaml").write_text("train: images/list.txt\nnames: [a]\n")
    return YoloDataset(root / "data.yaml")


def _voc_list(root: Path, name: str) -> FileDataset:
    (root / "images").rename(root / "JPEGImages")
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    (root / "Annotations" / "1.xml").write_text(XML.format("1.jpg"))
    listing = root / "ImageSets" / "Main" / "train.txt"
    listing.write_text(f"1\n{name.removesuffix('.jpg')}\n", errors="surrogateescape")
    return VocDataset(root)


def _voc_name(root: Path, name: str) -> FileDataset:
    """The xml names an image, which in layouts of other tools is looked for."""
    for stem, file in (("1", "1.jpg"), ("2", name)):
        (root / "images" / f"{stem}.xml").write_text(XML.format(file), errors="surrogateescape")
    return DataFolder(root, format="voc", train_split="all", val_split="all").read("train")


def _names(folder: Path) -> Iterator[Outcome]:
    opened = _Opened()
    readers: dict[str, Callable[[Path, str], FileDataset]] = {
        "COCO": _coco, "YOLO list": _yolo, "VOC list": _voc_list, "VOC filename": _voc_name,
    }  # fmt: skip
    before = os.environ.get("HOME", "")
    for kind in names_of(folder):
        for format, read in readers.items():
            place = folder / f"{kind} {format}"
            root, outside = _set(place)
            os.environ["HOME"] = str(outside)
            said, found, names = "", list[str](), list[str]()
            try:
                with opened.heard() as names:
                    dataset = read(root, names_of(outside)[kind])
                    found = [dataset[index].target.path for index in range(len(dataset))]
                said = f"read {found}"
            except DataError as error:
                said = str(error)
            finally:
                os.environ["HOME"] = before
            real = [os.path.realpath(path) for path in [*found, *names] if "\0" not in path]
            left = [path for path in real if path.startswith((str(outside), "/dev/zero", "socket"))]
            yield Outcome(f"{kind}, {format}", not left and "\n" not in said, f"{left} {said[:200]}")


LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
BOMBS = {
    "billion laughs": f'<!DOCTYPE a [<!ENTITY l0 "lol">{LAUGHS}]><annotation><filename>&l9;</filename></annotation>',
    "quadratic blow-up": f'<!DOCTYPE a [<!ENTITY b "{"b" * 100_000}">]><annotation>{"&b;" * 30_000}</annotation>',
    "external entity": '<!DOCTYPE a [<!ENTITY x SYSTEM "file://{0}">]><annotation><filename>&x;</filename></annotation>',
    "external entity on the web": '<!DOCTYPE a [<!ENTITY x SYSTEM "http://localhost:1/x">]><annotation>&x;</annotation>',
    "parameter entity": '<!DOCTYPE a [<!ENTITY % x SYSTEM "file://{0}"> %x;]><annotation/>',
    "external DTD": '<!DOCTYPE annotation SYSTEM "file://{0}"><annotation/>',
    "public DTD": '<!DOCTYPE annotation PUBLIC "-//A//B" "http://localhost:1/a.dtd"><annotation/>',
    "nested deep": "<annotation>" * 50_000,
    "an attribute of 5 MB": f'<annotation a="{"a" * 5_000_000}"/>',
    "50,000 attributes": "<annotation " + " ".join(f'a{i}="1"' for i in range(50_000)) + "/>",
    "a stylesheet": '<?xml-stylesheet href="file://{0}"?><annotation/>',
    "an inclusion": '<annotation xmlns:x="http://www.w3.org/2001/XInclude"><x:include href="{0}" parse="text"/>'
    "</annotation>",
}
LIMIT = 1.0
"""Seconds of the processor."""


def _xml(folder: Path) -> Iterator[Outcome]:
    opened = _Opened()
    for number, (kind, text) in enumerate(BOMBS.items()):
        for encoding in ("utf-8", "utf-16"):
            root, outside = _set(folder / f"{number}{encoding}")
            secret = outside / "secret.txt"
            (root / "images").rename(root / "JPEGImages")
            for place in ("Annotations", "ImageSets/Main"):
                (root / place).mkdir(parents=True)
            (root / "ImageSets" / "Main" / "train.txt").write_text("1\n")
            (root / "Annotations" / "1.xml").write_bytes(text.replace("{0}", str(secret)).encode(encoding))
            names: list[str] = []
            started = time.process_time()
            try:
                with opened.heard() as names:
                    said = f"read with {len(VocDataset(root, classes=['a']))} images"
            except DataError as error:
                said = str(error)
            spent = time.process_time() - started
            left = [name for name in names if str(outside) in name or name.startswith("socket")]
            fine = not left and spent < LIMIT and "\n" not in said
            yield Outcome(f"{kind}, {encoding}", fine, f"{spent:.2f} s {left} {said[:150]}")


ROWS = [
    Row(
        "R16.1",
        "18 hostile names (.., absolute, UNC, null byte, percent-encoded, too long, links to devices, ...) in COCO, "
        "YOLO and VOC",
        "no file outside of the set is opened; one line, or the image is another one inside",
        _names,
        10,
    ),
    Row(
        "R17.1",
        "xml with entities, external files, inclusions and great depth, in two encodings",
        "no other file and no address is opened, less than a second of the processor, at most one line",
        _xml,
        10,
    ),
]
