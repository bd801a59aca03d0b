"""YOLO layout: a yaml with names and splits, one text file of relative boxes or polygons per image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dyndet.data.images import SUFFIXES, read_header, resolve_inside
from dyndet.data.masks import Segmentation
from dyndet.data.records import WITHOUT_MASKS, FileDataset, Record, Repairs
from dyndet.errors import DataError, MissingDataError
from dyndet.structures import Category


class YoloDataset(FileDataset):
    """Images with label files `class cx cy w h` or `class x1 y1 x2 y2 x3 y3 ...`, relative to the image.

    The label file of an image has the last folder called "images" replaced by "labels" (it lies beside the image when
    there is none); an image without one is a negative. Image ids are ranks in path order, from 1; category ids are the
    yaml's.

    Args:
        config: the yaml with `names`, the splits, and optionally `path`.
        split: key of the yaml that names a folder of images, a text file listing images, or several of these.
        root: folder that the splits start from; None takes the yaml's `path`, which must lie beside or below the yaml.
        load_masks: whether targets carry (N, H, W) masks; every object needs a polygon then.
        skip_empty: leaves out images without a box that trains.

    Raises:
        DataError: if a file is missing, malformed or outside of the root, or no image of the split has labels.
            Boxes that are not in their image are clipped or dropped instead, and counted in `repairs`.
    """

    def __init__(
        self,
        config: str | Path,
        *,
        split: str = "train",
        root: str | Path | None = None,
        load_masks: bool = False,
        skip_empty: bool = False,
    ) -> None:
        config = Path(config)
        content = _load(config)
        categories = _categories(content, config)
        if root is None:
            root = _inside(config.parent, content.get("path") or ".", f"{config}: path")
        root = Path(root).absolute()
        images = _images(root, content, split, config)
        pairs = [(image, _label_file(root, image)) for image in images]
        if pairs and not any(label.is_file() for _, label in pairs):
            raise DataError(f"no image of split {split!r} of {config} has labels: expected for example {pairs[0][1]}")
        labels = {category.id: label for label, category in enumerate(categories)}
        repairs = Repairs()
        records = [
            _record(image, file, rank, labels, load_masks, repairs) for rank, (image, file) in enumerate(pairs, start=1)
        ]
        source = f"{config} ({split})"
        super().__init__(
            records, categories, load_masks=load_masks, skip_empty=skip_empty, repairs=repairs, source=source
        )


def _load(config: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(config.read_text("utf-8-sig"))
    except OSError as error:
        raise MissingDataError(f"{config} cannot be read ({error.strerror}): check the path") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{config} is not valid yaml ({error}): correct it") from error
    if not isinstance(content, dict):
        raise DataError(f"{config} is not a YOLO configuration: it needs names and the splits")
    return content


def _categories(content: dict[str, Any], config: Path) -> list[Category]:
    names = content.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names or not all(isinstance(key, int) for key in names):
        raise DataError(f"{config} has no usable names: give a list, or a mapping from class number to name")
    if content.get("nc", len(names)) != len(names):
        raise DataError(f"{config} has nc {content['nc']} but {len(names)} names: correct one of them")
    return [Category(id, str(names[id])) for id in sorted(names)]


def _images(root: Path, content: dict[str, Any], split: str, config: Path) -> list[Path]:
    """Image files of a split, sorted."""
    entries = content.get(split)
    if not entries:
        found = ", ".join(key for key in ("train", "val", "test") if content.get(key)) or "none"
        raise DataError(f"{config} has no split {split!r}: choose one of those it has ({found})")
    images: list[Path] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        source = _inside(root, entry, f"{config}: {split}")
        if source.is_dir():
            files = (file for file in source.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            images += [_inside(root, file, str(source)) for file in files if file.name[0] != "."]
        elif source.is_file():
            images += _listed(root, source)
        else:
            raise MissingDataError(
                f"{config}: {split} names {source}, which does not exist: correct it, or set data.root"
            )
    if not images:
        raise DataError(f"split {split!r} of {config} has no images")
    return sorted(set(images))


def _listed(root: Path, listing: Path) -> list[Path]:
    """Images of a text file; names start from its folder."""
    try:
        lines = listing.read_text("utf-8-sig").splitlines()
    except ValueError as error:
        raise DataError(f"{listing} is not a text file ({error}): it lists one image per line") from error
    return [_inside(root, listing.parent / line.strip(), str(listing)) for line in lines if line.strip()]


def _inside(root: Path, name: object, where: str) -> Path:
    try:
        return resolve_inside(root, str(name))
    except DataError as error:
        raise DataError(f"{where}: {error}, or set data.root to the folder that holds the data") from error


def _label_file(root: Path, image: Path) -> Path:
    parts = list(image.parts)
    above = len(root.parts) if image.is_relative_to(root) else 0
    folders = [place for place in range(above, len(parts) - 1) if parts[place] == "images"]
    if folders:
        parts[folders[-1]] = "labels"
    return _inside(root, Path(*parts).with_suffix(".txt"), str(image))


def _record(
    image: Path, file: Path, image_id: int, labels: dict[int, int], load_masks: bool, repairs: Repairs
) -> Record:
    header = read_header(image)
    height, width = header.upright  # what labels are relative to
    scale = np.array([width, height], np.float64)
    boxes: list[np.ndarray] = []
    classes: list[int] = []
    polygons: list[Segmentation] = []
    lines: list[int] = []
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        id, points = _parse(line, where)
        if id not in labels:
            raise DataError(f"{where} has class {id}, which the configuration does not name: correct one of them")
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
    return record.repaired(repairs, lambda index: f"{file.name} line {lines[index]}")


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text("utf-8-sig").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as text ({error}): correct it") from error


def _parse(line: str, where: str) -> tuple[int, np.ndarray]:
    """Class and (2, 2) centre and extent or (P, 2) polygon, relative."""
    try:
        id, *numbers = [float(word) for word in line.split()]
    except ValueError:
        id, numbers = float("nan"), []
    if not id.is_integer() or (len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2)):
        raise DataError(f"{where} is {line.strip()[:60]!r}: give `class cx cy w h` or `class x1 y1 x2 y2 x3 y3 ...`")
    return int(id), np.array(numbers, np.float64).reshape(-1, 2)
