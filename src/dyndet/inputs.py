"""What users hand to detectors, checked once, so that no mistake turns into a loss that is quietly wrong.

Shapes, types and counts are always checked. Values are where it is cheap: of tensors on the CPU, outside of graphs that
are being captured; nothing here waits for another device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dyndet.errors import UserError
from dyndet.structures import ImageBatch, Target

DARKEST, BRIGHTEST = -0.5, 1.5
"""Float pixels beyond are not of 0..1: resizing and jitter overshoot by less."""


def check_images(images: Tensor | Sequence[Tensor]) -> None:
    """A (B, 3, H, W) tensor, or (3, H, W) tensors of one type on one device; uint8, or float whose values are 0..1.

    Raises:
        UserError: if they are not.
    """
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
            raise UserError(f"images must be (B, 3, H, W), got {_shape(images)}{_shape_hint(images, 4)}")
        _check_type(images, "images")
        _check_values(images, "images[{}]")
        return
    if not isinstance(images, Sequence) or isinstance(images, str):
        raise UserError(f"images are a {type(images).__name__}: give a (B, 3, H, W) tensor or a list of (3, H, W)")
    if not len(images):
        raise UserError("images is empty: give at least one")
    first = images[0]
    for index, image in enumerate(images):
        name = f"images[{index}]"
        if not isinstance(image, Tensor):
            raise UserError(
                f"{name} is a {type(image).__name__}: give tensors (3, H, W), for instance by "
                "torchvision.transforms.v2.functional.pil_to_tensor(image.convert('RGB'))"
            )
        if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise UserError(f"each image must be (3, H, W), but {name} is {_shape(image)}{_shape_hint(image, 3)}")
        _check_type(image, name)
        if image.dtype != first.dtype or image.device != first.device:
            here, there = (f"{item.dtype} on {item.device}" for item in (first, image))
            raise UserError(f"images[0] is {here}, but {name} is {there}: bring all images to one type and device")
    for index, image in enumerate(images):
        _check_values(image[None], f"images[{index}]")


def check_pixels(batch: ImageBatch) -> None:
    """As `check_images`, of a batch that is made already."""
    _check_type(batch.pixels, "images.pixels")
    _check_values(batch.pixels, "images.pixels[{}]")


def checked_targets(targets: Sequence[Target | Mapping[str, Any]], images: ImageBatch) -> list[Target]:
    """One target per image, whose boxes are xyxy in pixels of it; they may reach out of it, but not lie outside.

    Raises:
        UserError: if something is missing, does not fit, or is no box.
    """
    if not isinstance(targets, Sequence) or len(targets) != len(images):
        many = f"{len(targets)} targets" if isinstance(targets, Sequence) else f"a {type(targets).__name__}"
        raise UserError(f"{many} for {len(images)} images: give a list with one target per image, without boxes too")
    for index, target in enumerate(targets):
        _check_fields(target, f"targets[{index}]")
    ready = [Target.of(target) for target in targets]
    check_boxes(ready, images)
    return ready


def check_boxes(targets: Sequence[Target], images: ImageBatch) -> None:
    """The values of the boxes that lie on the CPU, see `checked_targets`; all at once, a few microseconds each.

    Raises:
        UserError: on boxes that are inverted or empty, not finite, outside of their image, or fractions of it.
    """
    here = [index for index, target in enumerate(targets) if len(target.boxes) and _readable(target.boxes)]
    if not here:
        return
    counts = torch.tensor([len(targets[index].boxes) for index in here])
    boxes = torch.cat([targets[index].boxes for index in here])
    limits = images.sizes[here].flip(1).to(boxes.dtype).repeat_interleave(counts, 0)
    low, high = boxes[:, :2], boxes[:, 2:]
    good = (low < high) & (low < limits) & (high > 0) & low.isfinite() & high.isfinite()
    if bool(good.all()) and float(boxes.max()) > 1:
        return
    for index in here:
        _explain(targets[index], index, images.sizes[index].tolist())
    raise UserError("all boxes lie within 0..1: they are in pixels, so multiply fractions by the image's size")


def _explain(target: Target, index: int, size: Sequence[int]) -> None:
    """Raises what is wrong with the boxes of one image, if anything."""
    boxes, (height, width) = target.boxes, size
    low, high = boxes[:, :2], boxes[:, 2:]
    limit = boxes.new_tensor([width, height])
    mistakes = (
        (~boxes.isfinite().all(1), "is not finite: leave it out"),
        (
            (high < low).any(1),
            "ends before it begins: boxes are xyxy in pixels (left, top, right, bottom); those of xywh become that by "
            "torchvision.ops.box_convert(boxes, 'xywh', 'xyxy')",
        ),
        ((high == low).any(1), "has no area: leave it out (boxes are xyxy in pixels)"),
        (
            ((low >= limit) | (high <= 0)).any(1),
            f"lies outside of its image of {height} x {width} pixels (H x W): boxes are in pixels of the images given",
        ),
    )
    for wrong, what in mistakes:
        if bool(wrong.any()):
            which = int(wrong.nonzero()[0, 0])
            values = ", ".join(f"{value:g}" for value in boxes[which].tolist())
            name = f"targets[{index}]" + (f" ({target.path})" if target.path else "")
            raise UserError(f"{name}: box {which}, [{values}], {what}")


def _check_fields(target: Target | Mapping[str, Any], name: str) -> None:
    if isinstance(target, Target):
        fields: Mapping[str, Any] = {key: getattr(target, key) for key in ("boxes", "labels", "crowd", "masks")}
        name += f" ({target.path})" if target.path else ""
    elif isinstance(target, Mapping):
        fields = target
    else:
        raise UserError(f"{name} is a {type(target).__name__}: give a dict with boxes and labels, or a Target")
    for key in ("boxes", "labels"):
        if not isinstance(fields.get(key), Tensor):
            what = f"is a {type(fields[key]).__name__}" if key in fields else "is missing"
            raise UserError(f"{name}: {key} {what}: give a tensor, boxes (N, 4) and labels (N,)")
    boxes, labels = fields["boxes"], fields["labels"]
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise UserError(f"{name}: boxes must be (N, 4), got {_shape(boxes)}; without objects torch.zeros(0, 4)")
    layout = getattr(getattr(boxes, "format", None), "value", "XYXY")  # of torchvision's BoundingBoxes
    if layout != "XYXY":
        raise UserError(f"{name}: boxes are {layout}: convert them to XYXY")
    _check_kind(boxes, f"{name}: boxes", "real numbers", boxes.is_floating_point() or _whole(boxes))
    _check_count(labels, f"{name}: labels", len(boxes))
    _check_kind(labels, f"{name}: labels", "whole numbers 0..K-1", _whole(labels))
    for key in ("crowd", "iscrowd"):
        crowd = fields.get(key)
        if crowd is not None:
            if not isinstance(crowd, Tensor):
                raise UserError(f"{name}: {key} is a {type(crowd).__name__}: give a tensor (N,) of 0 and 1")
            _check_count(crowd, f"{name}: {key}", len(boxes))
            _check_kind(crowd, f"{name}: {key}", "0 or 1", crowd.dtype == torch.bool or _whole(crowd))
    masks = fields.get("masks")
    if masks is not None and (not isinstance(masks, Tensor) or masks.ndim != 3 or len(masks) != len(boxes)):
        got = _shape(masks) if isinstance(masks, Tensor) else type(masks).__name__
        raise UserError(f"{name}: masks must be ({len(boxes)}, H, W), one for each box, got {got}")


def _check_count(values: Tensor, name: str, count: int) -> None:
    if values.shape != (count,):
        raise UserError(f"{name} must be ({count},), one for each box, got {_shape(values)}")


def _check_kind(values: Tensor, name: str, wanted: str, good: bool) -> None:
    if not good and values.numel():
        raise UserError(f"{name} are {values.dtype}: give {wanted}")


def _whole(values: Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def _check_type(image: Tensor, name: str) -> None:
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise UserError(
            f"{name}: pixels are {image.dtype}: give uint8 of 0..255 (image.to(torch.uint8)), or float of 0..1"
        )


def _check_values(images: Tensor, name: str) -> None:
    """Of (B, 3, H, W) pixels; `name` has a place for the image's number where there are several."""
    if not images.is_floating_point() or not _readable(images):
        return
    if _in_range(*_ends(images)):
        return
    for index, image in enumerate(images):
        low, high = _ends(image)
        if low != low:
            raise UserError(f"{name.format(index)} holds NaN: check how it was made")
        if not _in_range(low, high):
            hint = (
                "divide by 255, or give uint8"
                if low >= DARKEST
                else "give it as it is, because the detector normalises it itself"
            )
            raise UserError(f"{name.format(index)} reaches from {low:g} to {high:g}, but floats are 0..1: {hint}")


def _ends(image: Tensor) -> tuple[float, float]:
    low, high = image.detach().aminmax()  # NaN if there is one
    return float(low), float(high)


def _in_range(low: float, high: float) -> bool:
    return low >= DARKEST and high <= BRIGHTEST


def _readable(values: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device or breaking a graph."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def _shape(values: Tensor) -> str:
    return f"({', '.join(map(str, values.shape))}{',' if values.ndim == 1 else ''})"


def _shape_hint(images: Tensor, wanted: int) -> str:
    channels = wanted - 3
    if images.ndim == 3 and wanted == 4:
        return ": put a single image into a list"
    if images.ndim != wanted or 0 in images.shape:
        return ""
    if images.shape[-1] == 3:
        return ": channels come first, see Tensor.permute"
    hints = {1: ": repeat grey three times", 4: ": leave the fourth channel out"}
    return hints.get(images.shape[channels], "")
