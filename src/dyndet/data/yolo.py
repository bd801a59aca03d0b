"""YOLO layout: a yaml with names and splits, one text file of relative boxes or polygons per image."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dyndet.data.faults import read_all
from dyndet.data.images import SUFFIXES, read_header
from dyndet.data.masks import Segmentation
from dyndet.data.quarantine import Fault, OnError
from dyndet.data.records import WITHOUT_MASKS, FileDataset, Record, Repairs
from dyndet.data.text_files import read_text
from dyndet.data.user_paths import lies_there
from dyndet.data.yolo_config import YoloConfig
from dyndet.errors import DataError

logger = logging.getLogger(__name__)

LONGEST = 1_000_000
"""Characters of a line: a polygon of 50,000 corners. Numbers of one line take fifty times as much memory."""


class YoloDataset(FileDataset):
    """Images with label files `class cx cy w h` or `class x1 y1 x2 y2 x3 y3 ...`, relative to the image.

    The label file of an image has the last folder called "images" replaced by "labels"; where the images of a folder
    have none there, they lie beside them. An image without one is a negative; how many are is logged. Image ids are
    ranks in path order, from 1; category ids are the yaml's.

    Args:
        config: the yaml with `names`, the splits, and optionally `path`; or what was read of it.
        split: key of the yaml that names a folder of images, a text file listing images, or several of these.
        root: folder that the splits start from; None takes the yaml's `path` or its own folder.
        load_masks: whether targets carry (N, H, W) masks; every object needs a polygon then.
        skip_empty: leaves out images without a box that trains.
        on_error: "skip" leaves out images that cannot be used, or whose labels cannot (`faults`).
        tolerant: reads images whose last bytes are missing, too.

    Attributes:
        unlabelled: images without a label file.

    Raises:
        DataError: if a file is missing, malformed or outside of what the yaml declares, or no image of the split has
            labels. Boxes that are not in their image are clipped or dropped instead, and counted in `repairs`.
    """

    def __init__(
        self,
        config: str | Path | YoloConfig,
        *,
        split: str = "train",
        root: str | Path | None = None,
        load_masks: bool = False,
        skip_empty: bool = False,
        on_error: OnError = "raise",
        tolerant: bool = False,
    ) -> None:
        if not isinstance(config, YoloConfig):
            config = YoloConfig.read(config, root)
        images = config.images(split)
        pairs = list(zip(images, label_files(images, config.bases, config.notes), strict=True))
        self.unlabelled = [image for image, (_, exists) in pairs if not exists]
        source = f"{config.source} ({split})"
        if len(self.unlabelled) == len(pairs):
            raise DataError(
                f"no image of split {split!r} of {config.source} has labels: expected for example {pairs[0][1][0]}"
            )
        if self.unlabelled:
            logger.warning(
                "%s: %d of %d images have no label file, e.g. %s: negatives on purpose, or a wrong folder?",
                source, len(self.unlabelled), len(pairs), self.unlabelled[0],
            )  # fmt: skip
        labels = {category.id: label for label, category in enumerate(config.categories)}
        repairs, used = Repairs(), set[int]()

        def record(item: tuple[int, tuple[Path, tuple[Path, bool]]]) -> Record:
            rank, (image, (file, exists)) = item
            return _record(image, file if exists else None, rank, labels, load_masks, repairs, config.keypoints, used)

        left_out: list[Fault] | None = [] if on_error == "skip" else None
        items = enumerate(pairs, start=1)
        try:
            records = read_all(record, items, source, left_out=left_out, name=lambda item: item[1][0])
        finally:
            _check_first_class(used, list(labels), source)
        super().__init__(
            records,
            config.categories,
            load_masks=load_masks,
            skip_empty=skip_empty,
            repairs=repairs,
            source=source,
            left_out=left_out,
            tolerant=tolerant,
        )


def label_files(images: Sequence[Path], bases: Sequence[Path], notes: list[str]) -> list[tuple[Path, bool]]:
    """The label file of each image, and whether it exists; `notes` gets the folders whose labels lie beside."""
    stems: dict[Path, set[str]] = {}
    for image in images:
        stems.setdefault(image.parent, set()).add(image.stem)
    home: dict[Path, tuple[Path, dict[str, Path]]] = {}
    for folder, names in stems.items():
        found = [(twin, _texts(twin)) for twin in [*twins(folder, bases), folder]]
        home[folder] = next(
            ((twin, texts) for twin, texts in found if names & texts.keys() and not _shared(twin, folder, names)),
            found[0],
        )
        if home[folder][0] == folder and twins(folder, bases):
            note = f"labels of {folder} lie beside the images"
            notes += [] if note in notes else [note]
    found = [(image.stem, *home[image.parent]) for image in images]
    return [(texts.get(stem, folder / f"{stem}.txt"), stem in texts) for stem, folder, texts in found]


def _shared(twin: Path, folder: Path, names: set[str]) -> bool:
    """Whether labels of one folder could be those of several folders of images."""
    if len(twin.parts) >= len(folder.parts):
        return False
    others = [other for other in folder.parent.iterdir() if other.is_dir() and other != folder]
    return any(image.stem in names for other in others for image in other.iterdir() if image.suffix.lower() in SUFFIXES)


def twins(folder: Path, bases: Sequence[Path]) -> list[Path]:
    """Folders of labels that may belong to a folder of images: the last "images" below a base is "labels" there, with
    or without the folders below it.
    """
    parts = list(folder.parts)
    above = max((len(base.parts) for base in bases if folder.is_relative_to(base)), default=1)
    places = [place for place in reversed(range(1, len(parts))) if parts[place].lower() in ("images", "jpegimages")]
    places.sort(key=lambda place: place < above)
    names = ("labels", "Labels")
    found = [Path(*parts[:place], name, *parts[place + 1 :]) for place in places for name in names]
    flat = [Path(*parts[:place], name) for place in places if place < len(parts) - 1 for name in names]
    return [*found, *flat]


def _texts(folder: Path) -> dict[str, Path]:
    if not lies_there(folder):
        return {}
    return {file.stem: file for file in folder.glob("*.[tT][xX][tT]")}


def _record(
    image: Path,
    file: Path | None,
    image_id: int,
    labels: dict[int, int],
    load_masks: bool,
    repairs: Repairs,
    keypoints: int,
    used: set[int],
) -> Record:
    header = read_header(image)
    height, width = header.upright  # what labels are relative to
    scale = np.array([width, height], np.float64)
    boxes: list[np.ndarray] = []
    classes: list[int] = []
    polygons: list[Segmentation] = []
    lines: list[int] = []
    for number, line in enumerate([] if file is None else _lines(file), start=1):
        where = f"{file} line {number}"
        if len(line) > LONGEST:
            raise DataError(f"{where} is a line of {len(line)} characters, more than {LONGEST}: give one object a line")
        if not line.strip():
            continue
        id, points = _parse(line, where, keypoints)
        used.add(id)
        if id not in labels:
            named = ", ".join(map(str, list(labels)[:8])) + (", ..." if len(labels) > 8 else "")
            raise DataError(
                f"{where} has class {id}, which the configuration does not name (it names {named}; classes usually "
                "count from 0): correct one of them"
            )
        if load_masks and len(points) == 2:
            raise DataError(f"{where} is a box without a polygon: {WITHOUT_MASKS}")
        with np.errstate(all="ignore"):
            points = points * scale
            centre, extent = points[0], points[-1]
            corners = (centre - extent / 2, centre + extent / 2) if len(points) == 2 else (points.min(0), points.max(0))
        boxes.append(np.concatenate(corners))
        classes.append(labels[id])
        polygons.append([points.ravel().tolist()])
        lines.append(number)
    boxes_array = np.array(boxes, np.float64).reshape(-1, 4)
    record = Record.of(image, image_id, header, boxes_array, classes, segmentations=polygons if load_masks else None)
    return record.repaired(repairs, lambda index: f"{image.stem}.txt line {lines[index]}")


def _check_first_class(used: set[int], ids: list[int], source: str) -> None:
    """Refuses labels that count from 1 where classes count from 0: as a whole, not file by file."""
    if used and ids == list(range(len(ids))) and min(used) > 0 and max(used) == len(ids):
        raise DataError(
            f"{source}: the labels use classes up to {len(ids)} and never 0, so they look counted from 1, but the "
            f"configuration names 0 to {len(ids) - 1}: subtract 1 from the first number of every line"
        )


def _lines(file: Path) -> list[str]:
    try:
        return read_text(file).splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as text ({error}): correct it") from error


def _parse(line: str, where: str, keypoints: int) -> tuple[int, np.ndarray]:
    """Class and (2, 2) centre and extent or (P, 2) polygon, relative."""
    try:
        id, *numbers = [float(word) for word in line.split()]
    except ValueError:
        id, numbers = float("nan"), []
    if keypoints and len(numbers) == 4 + keypoints:
        numbers = numbers[:4]
    if not id.is_integer() or (len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2 or keypoints)):
        given = f"{where} is {line.strip()[:60]!r}"
        if keypoints:
            raise DataError(f"{given}: kpt_shape says `class cx cy w h` and {keypoints} numbers of keypoints")
        score = "; the sixth looks like a score: is this a prediction?" if len(numbers) == 5 else ""
        raise DataError(f"{given}: give `class cx cy w h` or `class x1 y1 x2 y2 x3 y3 ...`{score}")
    return int(id), np.array(numbers, np.float64).reshape(-1, 2)
