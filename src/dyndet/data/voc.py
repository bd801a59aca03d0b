"""Pascal VOC: one xml per image (http://host.robots.ox.ac.uk/pascal/VOC)."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import parse

from dyndet.data.faults import read_all
from dyndet.data.images import SUFFIXES, read_header, resolve_inside
from dyndet.data.quarantine import Fault, OnError
from dyndet.data.records import FileDataset, Record, Repairs
from dyndet.data.text_files import LARGEST, read_text
from dyndet.errors import DataError, MissingDataError
from dyndet.structures import Category

logger = logging.getLogger(__name__)

_NO, _YES = ("", "0", "unspecified", "false", "no"), ("1", "true", "yes")
"""What tools write for `difficult`."""


class VocDataset(FileDataset):
    """The original layout: Annotations/, JPEGImages/, ImageSets/Main/SPLIT.txt; or another that was recognised.

    Coordinates are taken as pixel edges, without adding or subtracting 1. The image id is the rank of a file among all
    annotations, the category id the rank of a class; both start at 1 and are the same in every split.

    Args:
        root: folder that holds the three; or what was found in another layout.
        split: name of the list of images.
        classes: names to keep, in label order; None takes those of all annotations, sorted.
        keep_difficult: keeps objects marked difficult as crowd, which never trains and is ignored by the evaluation
            (the nearest to VOC, where a difficult object absorbs one detection, not several); otherwise they are
            left out.
        skip_empty: leaves out images without a box that trains.
        on_error: "skip" leaves out images that cannot be used, or whose annotations cannot (`faults`).
        tolerant: reads images whose last bytes are missing, too.

    Raises:
        DataError: if a file is missing, malformed or dangerous, or an image has another size than its xml says.
            Boxes that are not in their image are clipped or dropped instead, and counted in `repairs`.
    """

    def __init__(
        self,
        root: str | Path | VocFolder,
        *,
        split: str = "train",
        classes: Sequence[str] | None = None,
        keep_difficult: bool = True,
        skip_empty: bool = False,
        on_error: OnError = "raise",
        tolerant: bool = False,
    ) -> None:
        folder = root if isinstance(root, VocFolder) else OriginalFolder(root)
        source, members = folder.members(split)
        pages, unread = folder.pages
        here = set(members)
        left_out = [fault for fault in unread if Path(fault.file) in here] if on_error == "skip" else None
        if unread and left_out is None:
            read_all(_read_inside, [Path(fault.file) for fault in unread], folder.root)  # raises
        found = sorted({item.name for page in pages.values() for item in page.objects})
        names = found if classes is None else [classes] if isinstance(classes, str) else list(classes)
        absent = [name for name in names if name not in found]
        if absent:
            logger.warning("%s: classes that no annotation has: %s (it has %s)", folder.root, absent, found)
        labels = {name: label for label, name in enumerate(names)}
        ranks = {path: rank for rank, path in enumerate(folder.files, start=1)}
        repairs = Repairs()

        def record(file: Path) -> Record:
            image = folder.image(file, pages[file].filename)
            return _record(image, pages[file], ranks[file], labels, keep_difficult, repairs)

        usable = [file for file in members if file in pages]
        records = read_all(record, usable, source, left_out=left_out)
        categories = [Category(id, name) for id, name in enumerate(names, start=1)]
        super().__init__(
            records,
            categories,
            skip_empty=skip_empty,
            repairs=repairs,
            source=source,
            left_out=left_out,
            tolerant=tolerant,
        )


class VocFolder(ABC):
    """Where the annotations of a set lie, and what belongs to them. All are read once, with the first split.

    Attributes:
        root: the folder.
        files: all annotations, in the order of image ids.
    """

    root: Path
    files: list[Path]

    @abstractmethod
    def members(self, split: str) -> tuple[str | Path, list[Path]]:
        """What a split is called in messages, and its annotations."""

    @abstractmethod
    def image(self, file: Path, filename: str) -> Path:
        """The image of an annotation, which calls it `filename`."""

    @cached_property
    def pages(self) -> tuple[dict[Path, _Page], list[Fault]]:
        """What the files say, and those that cannot be read."""
        unread: list[Fault] = []
        pages = read_all(lambda path: (path, _read_inside(path)), self.files, self.root, left_out=unread)
        return dict(pages), unread


class OriginalFolder(VocFolder):
    """Annotations/, ImageSets/Main/ and a folder of images.

    Args:
        root: folder that holds them.
        images: of all annotations' images; JPEGImages when None.
    """

    def __init__(self, root: str | Path, images: Path | None = None) -> None:
        self.root = Path(root)
        self.images = images or self.root / "JPEGImages"
        files = sorted((self.root / "Annotations").glob("*.xml"))
        self.files = [path for path in files if not path.name.startswith(".")]

    def members(self, split: str) -> tuple[str | Path, list[Path]]:
        listing, stems = _stems(self.root, split)
        by_stem = {path.stem: path for path in self.files}
        for stem in stems:
            if stem not in by_stem:
                raise DataError(f"{listing} names {stem!r}, but Annotations has no such xml: add it or remove the line")
        return listing, [by_stem[stem] for stem in stems]

    def image(self, file: Path, filename: str) -> Path:
        return _image(self.images, file.stem)


@dataclass(frozen=True, slots=True)
class _Object:
    name: str
    difficult: bool
    box: list[float]
    position: int


@dataclass(frozen=True, slots=True)
class _Page:
    """What one xml says; its size (H, W) holds 0 when it does not say."""

    path: Path
    filename: str
    size: tuple[float, float]
    objects: list[_Object]


def _stems(root: Path, split: str) -> tuple[Path, list[str]]:
    """The list file of a split and the file stems in it."""
    folder = root / "ImageSets" / "Main"
    listing = resolve_inside(folder, f"{split}.txt")
    if not listing.is_file():
        splits = ", ".join(sorted(path.stem for path in folder.glob("*.txt"))) or "none"
        raise MissingDataError(
            f"{listing} does not exist: set data.root, and data.train_split and data.val_split (splits found there: "
            f"{splits})"
        )
    try:
        lines = read_text(listing).splitlines()
    except ValueError as error:
        raise DataError(f"{listing} is not a text file ({error}): it lists one file name per line") from error
    stems = [line.strip() for line in lines if line.strip()]
    if len(set(stems)) < len(stems):
        twice = next(stem for stem in stems if stems.count(stem) > 1)
        raise DataError(f"{listing} names {twice!r} twice: remove one")
    return listing, stems


def _read_inside(path: Path) -> _Page:
    return _read(resolve_inside(path.parent, path.name))


def _read(path: Path) -> _Page:
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        page = parse(path, forbid_dtd=True).getroot()  # entities, the dangerous part, need a DTD
    except DefusedXmlException as error:
        raise DataError(f"{path} holds a DTD or entities ({error}): remove them, annotations need none") from error
    except (OSError, ParseError, ValueError, LookupError, RecursionError) as error:
        raise DataError(f"{path} is not valid xml ({error}): correct it or remove it from the set") from error
    if page is None:
        raise DataError(f"{path} is empty: correct it or remove it from the set")
    size = (_number(page, "size/height", path, 0), _number(page, "size/width", path, 0))
    filename = (page.findtext("filename") or "").strip()
    return _Page(
        path, filename, size, [_object(item, path, i) for i, item in enumerate(page.findall("object"), start=1)]
    )


def _object(item: Element, path: Path, position: int) -> _Object:
    name = (item.findtext("name") or "").strip()
    where = f"{path}: object {position} ({name})"
    if not name:
        raise DataError(f"{where} has no name: add one")
    box = [_number(item, f"bndbox/{side}", where) for side in ("xmin", "ymin", "xmax", "ymax")]
    return _Object(name, _difficult(item, where), box, position)


def _difficult(item: Element, where: str) -> bool:
    word = (item.findtext("difficult") or "").strip().lower()
    if word in _NO or word in _YES:
        return word in _YES
    return _number(item, "difficult", where) == 1


def _number(item: Element, key: str, where: str | Path, default: float | None = None) -> float:
    text = item.findtext(key)
    if text is None and default is not None:
        return default
    try:
        return float(text or "")
    except ValueError:
        raise DataError(f"{where} has {key} {text!r}: give a number") from None


def _record(
    path: Path, page: _Page, image_id: int, labels: dict[str, int], keep_difficult: bool, repairs: Repairs
) -> Record:
    header = read_header(path)
    size = header.stored if page.size == header.stored else header.upright
    sized = 0 not in page.size
    if sized and page.size != size:
        turned = f", nor without its EXIF orientation {header.orientation}" if header.orientation != 1 else ""
        raise DataError(
            f"{page.path} is for an image of {page.size[0]:g} x {page.size[1]:g} pixels (H x W), but {path} has "
            f"{size[0]} x {size[1]}{turned}: use the annotated file"
        )
    objects = [item for item in page.objects if item.name in labels and (keep_difficult or not item.difficult)]
    boxes = [item.box for item in objects]
    classes, crowd = [labels[item.name] for item in objects], [item.difficult for item in objects]
    record = replace(Record.of(path, image_id, size, boxes, classes, crowd), header=header, sized=sized)
    return record.repaired(repairs, lambda index: f"{page.path.name} object {objects[index].position}")


def _image(folder: Path, stem: str) -> Path:
    usual = resolve_inside(folder, f"{stem}.jpg")
    others = (folder / f"{stem}{suffix}" for suffix in sorted(SUFFIXES | {suffix.upper() for suffix in SUFFIXES}))
    if usual.is_file():
        return usual
    return next((resolve_inside(folder, path.name) for path in others if path.is_file()), usual)
