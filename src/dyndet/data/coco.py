"""COCO json: boxes, crowds, polygons and run lengths (https://cocodataset.org/#format-data)."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dyndet.data.faults import read_all
from dyndet.data.images import find_inside, read_header
from dyndet.data.masks import Segmentation
from dyndet.data.numbers import Entry, number, text, whole
from dyndet.data.quarantine import Fault, OnError
from dyndet.data.records import WITHOUT_MASKS, FileDataset, Record, Repairs
from dyndet.errors import DataError, MissingDataError
from dyndet.structures import Category, Truth


class CocoDataset(FileDataset):
    """Images with a COCO json. Category and image ids may have gaps and come back unchanged.

    Sizes that the json does not tell are those of the images. Numbers may be written as texts (`iscrowd: "0"`) or
    floats (`3.0`); where no annotation has an id, they are numbered. File names may be those of Windows or macOS
    (`find_inside`). Of a Roboflow export the placeholder that stands for all classes is left out: category 0 without
    annotations, the supercategory of the others.

    Args:
        annotations: the json file.
        images: the folder that its file names start from.
        classes: names of the categories to keep, in label order; None keeps all, ordered by id.
        skip_empty: leaves out images without a box that trains (usual for training; evaluation needs them all).
        load_masks: whether targets carry (N, H, W) masks.
        on_error: "skip" leaves out images that cannot be used, or whose annotations cannot (`faults`).
        tolerant: reads images whose last bytes are missing, too.
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
        on_error: OnError = "raise",
        tolerant: bool = False,
        content: Entry | None = None,
    ) -> None:
        file, folder = Path(annotations), Path(images)
        classes = [classes] if isinstance(classes, str) else classes
        content = load_coco(file) if content is None else content
        if not folder.is_dir():
            raise MissingDataError(
                f"image folder {folder} does not exist: give the folder that {file} takes its names from"
            )
        try:
            _settle(content, file)
            known = _categories(content, file)
            grouped = _by_image(content, {category.id for category in known}, file)
            categories = known if classes is None else _chosen(known, classes, file)
            repairs = Repairs()
            labels = {category.id: label for label, category in enumerate(categories)}

            def record(entry: Entry) -> Record:
                return _record(entry, grouped[entry["id"]], labels, folder, file, load_masks, repairs)

            left_out: list[Fault] | None = [] if on_error == "skip" else None
            records = read_all(
                record,
                content["images"],
                file,
                left_out=left_out,
                name=lambda entry: folder / str(entry.get("file_name", f"image {entry['id']}")),
            )
        except KeyError as error:
            raise DataError(f"{file} has an entry without {error}: see cocodataset.org/#format-data") from error
        super().__init__(
            records,
            categories,
            load_masks=load_masks,
            skip_empty=skip_empty,
            repairs=repairs,
            source=file,
            left_out=left_out,
            tolerant=tolerant,
        )


def load_coco(file: Path) -> Entry:
    """Parses a COCO json.

    Raises:
        DataError: if it cannot be read, or lacks one of its lists.
    """
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise MissingDataError(f"annotation file {file} cannot be read ({error.strerror}): check the path") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"annotation file {file} is not valid json ({error}): export or download it again") from error
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f'annotation file {file} has no list of objects "{key}": a COCO json needs one (or [])')
    return content


def _settle(content: Entry, file: Path) -> None:
    """Makes whole numbers of all ids, in place."""
    for entry in content["categories"]:
        entry["id"] = whole(entry, "id", f"{file}: category")
    for entry in content["images"]:
        entry["id"] = whole(entry, "id", f"{file}: image {entry.get('file_name')}")
    annotations = content["annotations"]
    unnumbered = not any("id" in entry for entry in annotations)
    for position, entry in enumerate(annotations):
        if unnumbered:
            entry["id"] = position + 1
        entry["id"] = whole(entry, "id", f"{file}: annotation at position {position}")
        for key in ("category_id", "image_id"):
            entry[key] = whole(entry, key, f"{file}: annotation {entry['id']}")


def _categories(content: Entry, file: Path) -> list[Category]:
    entries = [entry for entry in content["categories"] if not _is_placeholder(entry, content)]
    categories = [Category(entry["id"], text(entry, "name", f"{file}: category {entry['id']}")) for entry in entries]
    if len({category.id for category in categories}) < len(categories):
        raise DataError(f"{file}: category ids must be unique")
    return sorted(categories, key=lambda category: category.id)


def _is_placeholder(entry: Entry, content: Entry) -> bool:
    if entry["id"] != 0 or entry.get("supercategory") != "none":
        return False
    others = [other for other in content["categories"] if other is not entry]
    if not others or any(other.get("supercategory") != entry.get("name") for other in others):
        return False
    return all(annotation["category_id"] != 0 for annotation in content["annotations"])


def _chosen(known: list[Category], names: Sequence[str], file: Path) -> list[Category]:
    by_name = {category.name: category for category in known}
    if len(by_name) < len(known):
        return known  # refused as a whole
    for name in names:
        if name not in by_name:
            raise DataError(f"{file} has no category {name!r}: choose classes from {', '.join(by_name)}")
    return [by_name[name] for name in names]


def _by_image(content: Entry, category_ids: set[int], file: Path) -> dict[int, list[Entry]]:
    """Annotations per image id, once all ids are known to be right."""
    image_ids = set()
    for entry in content["images"]:
        image_id = entry["id"]
        if image_id in image_ids:
            raise DataError(f"{file}: image id {image_id} occurs twice ({entry.get('file_name')}): ids must be unique")
        image_ids.add(image_id)
    grouped: dict[int, list[Entry]] = defaultdict(list)
    seen = set()
    for entry in content["annotations"]:
        key, where = entry["id"], f"{file}: annotation {entry['id']}"
        if key in seen:
            raise DataError(f"{where} occurs twice: annotation ids must be unique")
        if entry["category_id"] not in category_ids:
            raise DataError(f"{where} has category_id {entry['category_id']}, which is not in the list of categories")
        if entry["image_id"] not in image_ids:
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
        path = find_inside(folder, text(image, "file_name", where))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    sized = any(image.get(key) is not None for key in ("height", "width"))
    header = None if sized else read_header(path)
    size = (whole(image, "height", where), whole(image, "width", where)) if header is None else header.upright
    if min(size) < 1:
        raise DataError(f"{where} has a height or width below 1: correct the sizes")

    entries = [entry for entry in annotations if entry["category_id"] in labels]
    names = [f"{file}: annotation {entry['id']}" for entry in entries]
    boxes = np.array([_box(*pair) for pair in zip(entries, names, strict=True)], np.float64).reshape(-1, 4)
    corners = boxes.copy()
    with np.errstate(over="ignore", invalid="ignore"):
        corners[:, 2:] += boxes[:, :2]
        areas = np.array([_area(*found) for found in zip(entries, boxes.tolist(), names, strict=True)], np.float64)
    classes = np.array([labels[entry["category_id"]] for entry in entries], np.int64)
    crowd = np.array([_crowd(*pair) for pair in zip(entries, names, strict=True)], np.bool_)
    parts = [_segmentation(*pair) for pair in zip(entries, names, strict=True)] if load_masks else None
    record = Record(
        path=path,
        image_id=image["id"],
        size=size,
        boxes=corners,
        labels=classes,
        crowd=crowd,
        areas=areas.astype(np.float32),
        segmentations=parts,
        annotation_ids=np.array([entry["id"] for entry in entries], np.int64),
        truth=Truth(boxes, classes, crowd, areas, parts),
        header=header,
        sized=sized,
    )
    return record.repaired(repairs, lambda index: f"annotation {entries[index]['id']}")


def _box(entry: Entry, where: str) -> list[float]:
    box = entry.get("bbox")
    sides = [number(side) for side in box] if isinstance(box, list) and len(box) == 4 else [None]
    if None in sides:
        raise DataError(f"{where} has bbox {box!r}: give [x, y, width, height] in pixels")
    return [side for side in sides if side is not None]


def _area(entry: Entry, box: list[float], where: str) -> float:
    """As annotated, else of the box."""
    if entry.get("area") is None:
        return abs(box[2] * box[3])
    area = number(entry["area"])
    if area is None or not 0 <= area < float("inf"):
        raise DataError(f"{where} has area {entry['area']!r}: give square pixels, or leave it out")
    return area


def _crowd(entry: Entry, where: str) -> bool:
    value = entry.get("iscrowd")
    if value is not None and number(value) not in (0, 1):
        raise DataError(f"{where} has iscrowd {value!r}: give 0 or 1, or leave it out")
    return number(value) == 1


def _segmentation(entry: Entry, where: str) -> Segmentation:
    segmentation = entry.get("segmentation")
    if not segmentation or not isinstance(segmentation, list | dict):
        raise DataError(f"{where} has no segmentation: add one or {WITHOUT_MASKS}")
    return segmentation
