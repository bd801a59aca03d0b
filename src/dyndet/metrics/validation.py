"""What a validation found, image by image, as files that need no model and no data set to be read again.

`detections.json` and `ground_truth.json` are COCO's formats; `compute.json` has the multiply-adds of every image.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert

from dyndet.disk import write_whole
from dyndet.metrics.export import to_coco_json, truth_of
from dyndet.structures import Category, Detections, Size, Target

FILES = ("ground_truth.json", "detections.json", "compute.json")


@dataclass
class ImageFacts:
    """Rows of the three files.

    Attributes:
        images: one per image: id, height, width, file_name, and the path of the file.
        annotations: of the images, without ids.
        detections: see `to_coco_json`.
        compute: one per image: image_id, macs, and hard where a router chose between two routes.
    """

    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    detections: list[dict[str, Any]] = field(default_factory=list)
    compute: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self, found: Detections, target: Target, size: Size, categories: Sequence[Category], hard: bool | None = None
    ) -> None:
        """Adds an image.

        Args:
            found: in pixels of the image on disk.
            target: in pixels of an image of `size`.
            size: H, W without padding.
            categories: label k is `categories[k]`.
            hard: the route it took, where there are two.
        """
        (height, width), path = target.original_size, target.path
        place = str(Path(path).absolute()) if path else ""
        entry = {"id": target.image_id, "height": height, "width": width, "file_name": Path(path).name, "path": place}
        self.images.append(entry)
        truth = truth_of(target, size)
        areas = np.abs(truth.boxes[:, 2:].prod(1)) if truth.area is None else truth.area
        columns = (truth.boxes.tolist(), areas.tolist(), truth.labels.tolist(), truth.crowd.tolist())
        for box, area, label, many in zip(*columns, strict=True):
            row = {"image_id": target.image_id, "category_id": categories[label].id}
            self.annotations.append(row | {"bbox": box, "area": area, "iscrowd": int(many)})
        self.detections += to_coco_json([found], [target.image_id], categories)
        spent: dict[str, Any] = {"image_id": target.image_id, "macs": found.macs}
        self.compute.append(spent if hard is None else spent | {"hard": hard})

    def __iadd__(self, other: ImageFacts) -> ImageFacts:
        self.images += other.images
        self.annotations += other.annotations
        self.detections += other.detections
        self.compute += other.compute
        return self

    def write(self, folder: Path, categories: Sequence[Category]) -> None:
        """Writes the three files; paths inside of the folder are written as seen from there."""
        home = f"{folder.absolute()}/"
        truth = {
            "info": {"description": "written by dyndet"},
            "images": [image | {"path": image["path"].removeprefix(home)} for image in self.images],
            "annotations": [{"id": number} | row for number, row in enumerate(self.annotations, 1)],
            "categories": [{"id": category.id, "name": category.name} for category in categories],
        }
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in zip(FILES, (truth, self.detections, self.compute), strict=True):
            write_whole(folder / name, json.dumps(content))


@dataclass(frozen=True)
class Validation:
    """Every image of a validation, in the order of their ids.

    Attributes:
        categories: label k is `categories[k]`.
        targets: as annotated, in pixels of the image on disk, with the path of its file.
        detections: one per image, likewise, by descending score, with the multiply-adds spent on it.
        hard: the image took the second detector's route; empty where there is one route.
    """

    categories: list[Category]
    targets: list[Target]
    detections: list[Detections]
    hard: list[bool] = field(default_factory=list)


def read_validation(folder: Path) -> Validation | None:
    """What a run left, None if it left nothing.

    Raises:
        ValueError: if the files cannot be read or do not belong together.
    """
    if not all((folder / name).is_file() for name in FILES):
        return None
    try:
        truth, results, compute = (json.loads((folder / name).read_text(encoding="utf-8")) for name in FILES)
        return _read(truth, results, compute, folder)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{', '.join(FILES)} cannot be read ({type(error).__name__}: {error})") from error


def _read(
    truth: dict[str, Any], results: list[dict[str, Any]], compute: list[dict[str, Any]], folder: Path
) -> Validation:
    categories = [Category(int(item["id"]), str(item["name"])) for item in truth["categories"]]
    label_of = {category.id: label for label, category in enumerate(categories)}
    images = sorted(truth["images"], key=lambda image: image["id"])
    objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in images}
    found: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in images}
    for rows, places in ((truth["annotations"], objects), (results, found)):
        for row in rows:
            places[row["image_id"]].append(row)
    spent = {row["image_id"]: row for row in compute}
    targets = [_target(image, objects[image["id"]], label_of, folder) for image in images]
    detections = [_detections(found[image["id"]], label_of, spent[image["id"]]["macs"]) for image in images]
    hard = [bool(spent[image["id"]]["hard"]) for image in images if "hard" in spent[image["id"]]]
    return Validation(categories, targets, detections, hard if len(hard) == len(images) else [])


def _target(image: dict[str, Any], rows: list[dict[str, Any]], label_of: dict[int, int], folder: Path) -> Target:
    return Target(
        _boxes(rows),
        torch.tensor([label_of[row["category_id"]] for row in rows], dtype=torch.int64),
        torch.tensor([bool(row["iscrowd"]) for row in rows], dtype=torch.bool),
        area=torch.tensor([float(row["area"]) for row in rows], dtype=torch.float64),
        image_id=int(image["id"]),
        original_size=(int(image["height"]), int(image["width"])),
        path=str(folder / image["path"]) if image["path"] else "",
    )


def _detections(rows: list[dict[str, Any]], label_of: dict[int, int], macs: float | None) -> Detections:
    rows = sorted(rows, key=lambda row: -row["score"])
    return Detections(
        _boxes(rows),
        torch.tensor([row["score"] for row in rows]).float(),
        torch.tensor([label_of[row["category_id"]] for row in rows], dtype=torch.int64),
        macs=macs,
    )


def _boxes(rows: list[dict[str, Any]]) -> Tensor:
    boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float64).view(-1, 4)
    return box_convert(boxes, "xywh", "xyxy").float()
