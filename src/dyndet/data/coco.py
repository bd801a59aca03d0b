"""COCO json: boxes, crowds, polygons and run lengths (https://cocodataset.org/#format-data)."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dyndet.data.images import resolve_inside
from dyndet.data.masks import Segmentation
from dyndet.data.records import FileDataset, Record, Repairs
from dyndet.errors import DataError
from dyndet.structures import Category

Entry = dict[str, Any]


class CocoDataset(FileDataset):
    """Images with a COCO json. Category and image ids may have gaps and come back unchanged.

    Args:
        annotations: the json file.
        images: the folder that its file names start from.
        classes: names of the categories to keep, in label order; None keeps all, ordered by id.
        skip_empty: leaves out images without a box that trains (usual for training; evaluation needs them all).
        load_masks: whether targets carry (N, H, W) masks.
        content: of the json, where `load_coco` has read it already.

    Raises:
        DataError: if the json or an entry of it is malformed, contradicts itself or names files outside of `images`.
            Boxes that are not in their image are clipped or dropped instead, and counted in `repairs`.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        *,
        classes: Sequence[str] | None = None,
        skip_empty: bool = False,
        load_masks: bool = False,
        content: Entry | None = None,
    ) -> None:
        file, folder = Path(annotations), Path(images)
        content = load_coco(file) if content is None else content
        if not folder.is_dir():
            raise DataError(f"image folder {folder} does not exist: give the folder that {file} takes its names from")
        try:
            known = _categories(content["categories"], file)
            grouped = _by_image(content, {category.id for category in known}, file)
            categories = known if classes is None else _chosen(known, classes, file)
            repairs = Repairs()
            labels = {category.id: label for label, category in enumerate(categories)}
            records = [
                _record(entry, grouped[entry["id"]], labels, folder, file, load_masks, repairs)
                for entry in content["images"]
            ]
        except KeyError as error:
            raise DataError(f"{file} has an entry without {error}: see cocodataset.org/#format-data") from error
        super().__init__(
            records, categories, load_masks=load_masks, skip_empty=skip_empty, repairs=repairs, source=file
        )


def load_coco(file: Path) -> Entry:
    """Parses a COCO json.

    Raises:
        DataError: if it cannot be read, or lacks one of its lists.
    """
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"annotation file {file} cannot be read ({error.strerror}): check the path") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"annotation file {file} is not valid json ({error}): export or download it again") from error
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f'annotation file {file} has no list of objects "{key}": a COCO json needs one (or [])')
    return content


def _categories(entries: list[Entry], file: Path) -> list[Category]:
    categories = [Category(_integer(entry, "id", f"{file}: category"), str(entry["name"])) for entry in entries]
    if len({category.id for category in categories}) < len(categories):
        raise DataError(f"{file}: category ids must be unique")
    return sorted(categories, key=lambda category: category.id)


def _chosen(known: list[Category], names: Sequence[str], file: Path) -> list[Category]:
    by_name = {category.name: category for category in known}
    for name in names:
        if name not in by_name:
            raise DataError(f"{file} has no category {name!r}: choose classes from {', '.join(by_name)}")
    return [by_name[name] for name in names]


def _by_image(content: Entry, category_ids: set[int], file: Path) -> dict[int, list[Entry]]:
    """Annotations per image id, once all ids are known to be right."""
    image_ids = set()
    for entry in content["images"]:
        image_id = _integer(entry, "id", f"{file}: image {entry.get('file_name')}")
        if image_id in image_ids:
            raise DataError(f"{file}: image id {image_id} occurs twice ({entry.get('file_name')}): ids must be unique")
        image_ids.add(image_id)
    grouped: dict[int, list[Entry]] = defaultdict(list)
    seen = set()
    for position, entry in enumerate(content["annotations"]):
        key = _integer(entry, "id", f"{file}: annotation at position {position}")
        where = f"{file}: annotation {key}"
        if key in seen:
            raise DataError(f"{where} occurs twice: annotation ids must be unique")
        if _integer(entry, "category_id", where) not in category_ids:
            raise DataError(f"{where} has category_id {entry['category_id']}, which is not in the list of categories")
        if _integer(entry, "image_id", where) not in image_ids:
            raise DataError(f"{where} has image_id {entry['image_id']}, which is not in the list of images")
        seen.add(key)
        grouped[entry["image_id"]].append(entry)
    return grouped


def _record(
    image: Entry,
    annotations: list[Entry],
    labels: dict[int, int],
    folder: Path,
    file: Path,
    load_masks: bool,
    repairs: Repairs,
) -> Record:
    where = f"{file}: image {image['id']}"
    try:
        path = resolve_inside(folder, image["file_name"])
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    size = (_integer(image, "height", where), _integer(image, "width", where))
    if min(size) < 1:
        raise DataError(f"{where} has a height or width below 1: correct the sizes")

    entries = [entry for entry in annotations if entry["category_id"] in labels]
    boxes = np.array([_box(entry, file) for entry in entries], np.float64).reshape(-1, 4)
    with np.errstate(over="ignore", invalid="ignore"):
        boxes[:, 2:] += boxes[:, :2]
        areas = np.array([_area(entry, file) for entry in entries], np.float64).astype(np.float32)
    record = Record(
        path=path,
        image_id=image["id"],
        size=size,
        boxes=boxes,
        labels=np.array([labels[entry["category_id"]] for entry in entries], np.int64),
        crowd=np.array([bool(entry.get("iscrowd", 0)) for entry in entries], np.bool_),
        areas=areas,
        segmentations=[_segmentation(entry, file) for entry in entries] if load_masks else None,
        annotation_ids=np.array([entry["id"] for entry in entries], np.int64),
    )
    return record.repaired(repairs, lambda index: f"annotation {entries[index]['id']}")


def _box(entry: Entry, file: Path) -> list[float]:
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(side, int | float) for side in box):
        raise DataError(f"{file}: annotation {entry['id']} has bbox {box!r}: give [x, y, width, height] in pixels")
    return [_float(side) for side in box]


def _area(entry: Entry, file: Path) -> float:
    """As annotated, else of the box."""
    area = entry.get("area")
    if area is None:
        return abs(_float(entry["bbox"][2]) * _float(entry["bbox"][3]))
    if not isinstance(area, int | float) or not 0 <= area < math.inf:
        raise DataError(f"{file}: annotation {entry['id']} has area {area!r}: give square pixels, or leave it out")
    return _float(area)


def _segmentation(entry: Entry, file: Path) -> Segmentation:
    segmentation = entry.get("segmentation")
    if not segmentation or not isinstance(segmentation, list | dict):
        raise DataError(f"{file}: annotation {entry['id']} has no segmentation: add one or set load_masks=false")
    return segmentation


def _integer(entry: Entry, key: str, where: str) -> int:
    value = entry.get(key)
    if not isinstance(value, int) or abs(value) >= 2**63:
        raise DataError(f"{where} has {key} {value!r}: give a whole number")
    return value


def _float(value: float) -> float:
    """Integers of json have no limit, floats do."""
    try:
        return float(value)
    except OverflowError:
        return math.inf
