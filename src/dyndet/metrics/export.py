"""Detections and ground truth as COCO json, so that any COCO tool can evaluate any dataset and any detector."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dyndet.data.dataset import DetectionDataset
from dyndet.data.masks import decode_mask, encode_mask
from dyndet.errors import DataError, UserError
from dyndet.structures import Category, Detections, Size, Target, Truth

BOX_DECIMALS = 3
"""Annotations rarely have more decimals, and float32 keeps this many: rounding restores the annotated numbers."""


def to_xywh(boxes: Tensor) -> Tensor:
    """(N, 4) xyxy to (N, 4) float64 xywh, on the CPU."""
    boxes = boxes.detach().to("cpu", torch.float64)
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)


def original_xywh(target: Target, size: Size) -> Tensor:
    """(N, 4) float64 xywh in pixels of the image on disk, as annotated.

    Resizing in float32 moves a box by about 1e-5 px, enough to cross an IoU threshold that an annotated box meets
    exactly; rounding to `BOX_DECIMALS` undoes it.

    Args:
        target: boxes in pixels of an image of `size`.
        size: H, W of that image without padding.
    """
    boxes = target.boxes.detach().to("cpu", torch.float64)
    if target.original_size != (0, 0) and tuple(size) != tuple(target.original_size):
        (height, width), (original_height, original_width) = size, target.original_size
        boxes = boxes * boxes.new_tensor([original_width / width, original_height / height] * 2)
    # Width and height are rounded again: a difference of two decimals is not the nearest float to its own decimal.
    return to_xywh(boxes.round(decimals=BOX_DECIMALS)).round(decimals=BOX_DECIMALS)


def original_masks(target: Target, size: Size) -> Tensor:
    """(N, H, W) bool masks at the size of the image on disk: as annotated where the target knows.

    Else they are resized back to the nearest pixel, which is exact unless the image had been made smaller.

    Raises:
        UserError: if the target has no masks.
    """
    if target.segmentations:
        return torch.from_numpy(np.stack([decode_mask(item, target.original_size) for item in target.segmentations]))
    if target.masks is None:
        where = f"image {target.image_id} {target.path}".rstrip()
        raise UserError(f"{where} has no masks to compare with: set data.masks=true, on data with masks")
    masks = target.masks.detach().cpu()[:, : size[0], : size[1]]
    if target.original_size in ((0, 0), tuple(size)) or not len(masks):
        return masks.bool()
    return F.interpolate(masks[None].float(), size=target.original_size, mode="nearest-exact")[0] > 0.5


def truth_of(target: Target, size: Size) -> Truth:
    """What evaluation compares with: the objects as annotated where the target knows, else its boxes on disk.

    Args:
        target: boxes in pixels of an image of `size`.
        size: H, W of that image without padding.
    """
    if target.truth is not None:
        return target.truth
    return Truth(
        original_xywh(target, size).numpy(),
        target.labels.cpu().numpy(),
        target.crowd.cpu().numpy(),
        None if target.area is None else target.area.detach().to("cpu", torch.float64).numpy(),
        target.segmentations,
    )


def truth_masks(target: Target, size: Size) -> Tensor:
    """(N, H, W) bool masks of `truth_of`, at the size of the image on disk.

    Raises:
        DataError: if a segmentation is malformed.
        UserError: if the target has no masks.
    """
    truth = target.truth
    if truth is None or not truth.segmentations:
        return original_masks(target, size)
    masks = np.zeros((len(truth.segmentations), *target.original_size), np.bool_)
    for index, segmentation in enumerate(truth.segmentations):
        try:
            masks[index] = decode_mask(segmentation, target.original_size)
        except DataError as error:
            raise DataError(f"object {index + 1} of image {target.image_id} {target.path}: {error}") from error
    return torch.from_numpy(masks)


def to_coco_json(
    detections: Sequence[Detections], images: Sequence[Target] | Sequence[int], categories: Sequence[Category]
) -> list[dict[str, Any]]:
    """COCO results: one dict per detection, with original image and category ids and unrounded boxes.

    Masks become run lengths. (pycocotools then still takes the area of the box; where AP of masks by size matters,
    leave out "bbox".)

    Args:
        detections: one per image, in pixels of the image on disk.
        images: the target, or the image id, of each.
        categories: label k is `categories[k]`.
    """
    results: list[dict[str, Any]] = []
    for found, image in zip(detections, images, strict=True):
        image_id = image.image_id if isinstance(image, Target) else int(image)
        masks = None if found.masks is None else [encode_mask(mask) for mask in found.masks.cpu()]
        boxes, scores, labels = to_xywh(found.boxes).tolist(), found.scores.tolist(), found.labels.tolist()
        for index, (box, score, label) in enumerate(zip(boxes, scores, labels, strict=True)):
            entry = {"image_id": image_id, "category_id": categories[label].id, "bbox": box, "score": score}
            results.append(entry if masks is None else entry | {"segmentation": masks[index]})
    return results


def write_results(path: str | Path, results: Sequence[dict[str, Any]]) -> Path:
    """Writes what `to_coco_json` gave to a file; missing folders are made."""
    return _write(path, list(results))


def write_ground_truth(dataset: DetectionDataset, path: str | Path | None = None) -> dict[str, Any]:
    """The dataset as a COCO annotation dict, also written to `path` if given.

    Every image is read once. Without annotated areas, an area is that of the mask, else of the box.

    Raises:
        DataError: if two images have the same id, so that results could not be told apart.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    seen: set[int] = set()
    for index in range(len(dataset)):
        sample = dataset[index]
        target = sample.target
        if target.image_id in seen:
            raise DataError(
                f"image id {target.image_id} appears twice (second: item {index} {target.path}); give images unique ids"
            )
        seen.add(target.image_id)
        size: Size = (sample.image.shape[-2], sample.image.shape[-1])
        height, width = size if target.original_size == (0, 0) else target.original_size
        name = Path(target.path).name
        images.append({"id": target.image_id, "height": height, "width": width, "file_name": name})
        for annotation in _annotations(target, size, dataset.categories):
            annotations.append({"id": len(annotations) + 1} | annotation)
    truth = {
        "info": {"description": "written by dyndet"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": category.id, "name": category.name} for category in dataset.categories],
    }
    if path is not None:
        _write(path, truth)
    return truth


def _annotations(target: Target, size: Size, categories: Sequence[Category]) -> list[dict[str, Any]]:
    truth = truth_of(target, size)
    areas = np.abs(truth.boxes[:, 2:].prod(1)) if truth.area is None else truth.area
    masks: list[dict[str, Any]] | None = None
    if target.masks is not None:
        pixels = truth_masks(target, size)
        masks = [encode_mask(mask) for mask in pixels]
        if truth.area is None:
            areas = pixels.sum((1, 2)).numpy()
    annotations: list[dict[str, Any]] = []
    for index, (label, crowd) in enumerate(zip(truth.labels.tolist(), truth.crowd.tolist(), strict=True)):
        entry = {
            "image_id": target.image_id,
            "category_id": categories[label].id,
            "bbox": truth.boxes[index].tolist(),
            "area": areas[index].item(),
            "iscrowd": int(crowd),
        }
        annotations.append(entry if masks is None else entry | {"segmentation": masks[index]})
    return annotations


def _write(path: str | Path, content: object) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path
