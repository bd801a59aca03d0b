"""The values that flow through dyndet: samples, batches, detections, losses.

Shape legend: B images, C channels, H x W map, L levels, N boxes, K classes.
Geometry: pixel edges are 0..W (no +1); boxes are xyxy in pixels; labels are contiguous 0..K-1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dyndet.routing import Routing

Size = tuple[int, int]
"""Height, width in pixels."""


@dataclass(frozen=True, slots=True)
class Category:
    """A class of the dataset: its original id (gaps allowed, comes back out unchanged) and its name."""

    id: int
    name: str


@dataclass(frozen=True, eq=False)
class Truth:
    """The objects of one image exactly as annotated, in pixels on disk: what evaluation compares with.

    Other than in a `Target`, boxes may leave the image here or have no area. Arrays, because they never leave the host.

    Attributes:
        boxes: (N, 4) float64, x, y, width, height.
        labels: (N,) int64 in 0..K-1.
        crowd: (N,) bool.
        area: (N,) float64 in square pixels, or None to take those of masks or boxes.
        segmentations: N polygons or run lengths, or None.
    """

    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    area: NDArray[np.floating] | None = None
    segmentations: list[Any] | None = None

    def __getitem__(self, keep: NDArray[np.bool_]) -> Truth:
        """Some of the objects: (N,) bool."""
        area = None if self.area is None else self.area[keep]
        parts = self.segmentations
        parts = None if parts is None else [part for part, kept in zip(parts, keep, strict=True) if kept]
        return Truth(self.boxes[keep], self.labels[keep], self.crowd[keep], area, parts)


@dataclass
class Target:
    """Ground truth of one image, fit for training.

    Attributes:
        boxes: (N, 4) float32, xyxy in pixels of the image it belongs to.
        labels: (N,) int64 in 0..K-1.
        crowd: (N,) bool; crowd regions never train, and evaluation ignores matches with them.
        masks: (N, H, W) bool, or None when the dataset has none or they were not asked for.
        area: (N,) annotated areas in square pixels on disk (COCO: of the mask), or None to take those of the boxes.
        image_id: id in the original annotations.
        original_size: (H, W) of the image as read from disk (upright), before any transform.
        path: the file it came from, "" when generated.
        difficulty: 0 (easy) .. 1 (hard) where the dataset knows it.
        segmentations: N polygons or run lengths of the masks on disk, as annotated, where the dataset has them:
            evaluation reads these, because transforms resize `masks`.
        truth: the objects as annotated, where the dataset reads them from files: evaluation compares with these.
            Transforms that move objects in the image drop it.
    """

    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    masks: Tensor | None = None
    area: Tensor | None = None
    image_id: int = 0
    original_size: Size = (0, 0)
    path: str = ""
    difficulty: float | None = None
    segmentations: list[Any] | None = None
    truth: Truth | None = None

    @classmethod
    def of(cls, value: Target | Mapping[str, Any]) -> Target:
        """Accepts a torchvision-style dict (`boxes`, `labels`, optional `iscrowd` or `crowd`, `masks`), too."""
        if isinstance(value, Target):
            return value
        labels, crowd = value["labels"], value.get("crowd", value.get("iscrowd"))
        if crowd is None:
            crowd = torch.zeros_like(labels, dtype=torch.bool)
        return cls(value["boxes"].float(), labels.long(), crowd.bool(), value.get("masks"))

    def shifted(self, offset: Tensor) -> Target:
        """The same objects in pixels of a canvas on which the image begins at this (row, column)."""
        move = offset.flip(0).repeat(2).to(self.boxes)
        return replace(self, boxes=self.boxes + move)

    def to(self, device: torch.device | str) -> Target:
        tensors = ("boxes", "labels", "crowd", "masks", "area")
        moved = {name: getattr(self, name).to(device) for name in tensors if getattr(self, name) is not None}
        return replace(self, **moved)

    def without_crowd(self) -> Target:
        """The same target with only the boxes that train."""
        if not self.crowd.any():
            return self
        return self[~self.crowd]

    def __getitem__(self, keep: Tensor) -> Target:
        """The same target with only some of its objects: (N,) bool or indices."""
        tensors = ("boxes", "labels", "crowd", "masks", "area")
        kept = {name: getattr(self, name)[keep] for name in tensors if getattr(self, name) is not None}
        return replace(self, **kept, segmentations=None, truth=None)  # evaluation reads whole targets

    def without_masks(self) -> Target:
        """The same target with boxes alone."""
        truth = None if self.truth is None else replace(self.truth, segmentations=None)
        return replace(self, masks=None, segmentations=None, truth=truth)


@dataclass
class Sample:
    """One image, uint8 (3, H, W) RGB, with its ground truth. Every dataset yields this."""

    image: Tensor
    target: Target


@dataclass
class ImageBatch:
    """Images padded at the bottom and right to one size.

    Attributes:
        pixels: (B, 3, H, W) RGB; uint8 0..255 or float 0..1 (the torchvision convention).
        sizes: (B, 2) int64, the valid H, W of each image inside `pixels`.
        original_sizes: (B, 2) int64, H, W on disk: detections are returned in these pixels.
        offsets: (B, 2) int64, the row and column inside `pixels` where each image begins; None: all at 0, 0.

    The sizes stay on the CPU: they steer Python code, and reading them from a GPU would wait for it.
    """

    pixels: Tensor
    sizes: Tensor
    original_sizes: Tensor
    offsets: Tensor | None = None

    @classmethod
    def of(cls, images: ImageBatch | Tensor | Sequence[Tensor], pad_multiple: int = 1) -> ImageBatch:
        """From a (B, 3, H, W) tensor, or from (3, H, W) tensors that are padded to a multiple of `pad_multiple`.

        What comes from users goes through `dyndet.inputs.check_images` before.
        """
        if isinstance(images, ImageBatch):
            return images
        if isinstance(images, Tensor):
            sizes = torch.tensor([images.shape[-2:]] * len(images), dtype=torch.int64)
            return cls(images, sizes, sizes)
        sizes = torch.tensor([image.shape[-2:] for image in images], dtype=torch.int64)
        height, width = (-(-int(side) // pad_multiple) * pad_multiple for side in sizes.amax(0))
        pixels = images[0].new_zeros(len(images), 3, height, width)
        for slot, image in zip(pixels, images, strict=True):
            slot[:, : image.shape[1], : image.shape[2]] = image
        return cls(pixels, sizes, sizes)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: Tensor | slice) -> ImageBatch:
        """Some of the images: (N,) int64 on the CPU, or a slice, whose pixels are a view."""
        offsets = None if self.offsets is None else self.offsets[index]
        pixels = self.pixels[index if isinstance(index, slice) else index.to(self.pixels.device)]
        return ImageBatch(pixels, self.sizes[index], self.original_sizes[index], offsets)

    def to(self, device: torch.device | str) -> ImageBatch:
        return replace(self, pixels=self.pixels.to(device, non_blocking=True))


@dataclass
class Batch:
    """What a data loader yields: padded images and one target per image (boxes in `images.pixels` pixels)."""

    images: ImageBatch
    targets: list[Target]

    def pin_memory(self) -> Batch:
        """Page-locked pixels, so that the copy to a GPU does not wait; called by data loaders."""
        return Batch(replace(self.images, pixels=self.images.pixels.pin_memory()), self.targets)

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.images.to(device), [target.to(device) for target in self.targets])


@dataclass
class Detections:
    """What was found in one image, in pixels of the original image, by descending score.

    Attributes:
        boxes: (N, 4) xyxy.
        scores: (N,) in 0..1.
        labels: (N,) int64 in 0..K-1.
        masks: (N, H, W) bool or None.
        macs: multiply-adds spent on this image, where they were metered.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None
    macs: float | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, keep: Tensor) -> Detections:
        """Only some of them: (N,) bool or indices."""
        masks = None if self.masks is None else self.masks[keep]
        return replace(self, boxes=self.boxes[keep], scores=self.scores[keep], labels=self.labels[keep], masks=masks)

    def to(self, device: torch.device | str) -> Detections:
        masks = None if self.masks is None else self.masks.to(device)
        return replace(
            self, boxes=self.boxes.to(device), scores=self.scores.to(device), labels=self.labels.to(device), masks=masks
        )


@dataclass
class HeadOutput:
    """Features of a head, and what was routed on the way.

    Attributes:
        cls: L x (B, C, H, W) for classification, finest first; empty where the head does not have this branch.
        reg: likewise for regression.
        routing: decisions of the branches that the head has; None where nothing is routed.
        losses: terms of its own, weights applied; training adds them to the detector's as `head/<name>`.
        computed: L x (B, 1, H, W) bool, the positions that exist: nothing is detected at others. None: all do.
    """

    cls: list[Tensor]
    reg: list[Tensor]
    routing: Routing | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    computed: list[Tensor] | None = None

    @classmethod
    def of(cls, branches: Mapping[str, list[Tensor]], routing: Routing | None = None) -> HeadOutput:
        """From the maps of the branches that there are."""
        return cls(branches.get("cls", []), branches.get("reg", []), routing)


@dataclass
class Losses:
    """Named scalar losses of a batch, ready to be summed (weights applied), and the routing behind them."""

    terms: dict[str, Tensor]
    routing: Routing | None = None

    @property
    def total(self) -> Tensor:
        return torch.stack(list(self.terms.values())).sum()
