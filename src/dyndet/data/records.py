"""Annotations of images that lie in files, checked and repaired once, and the dataset that decodes them on demand."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dyndet.data.images import image_size, read_image
from dyndet.data.masks import Segmentation, decode_mask
from dyndet.errors import DataError
from dyndet.structures import Category, Sample, Size, Target

logger = logging.getLogger(__name__)

TOLERANCE = 0.1
"""Pixels by which a box may leave its image unreported: annotations are rounded."""

EXAMPLES = 3


@dataclass(frozen=True)
class Record:
    """Annotations of one image, which is not decoded.

    Attributes:
        path: the image file.
        image_id: id in the original annotations.
        size: (H, W) as annotated.
        boxes: (N, 4) xyxy in pixels; float32 once repaired.
        labels: (N,) int64 in 0..K-1.
        crowd: (N,) bool.
        areas: (N,) annotated areas in square pixels, None where there are none.
        segmentations: N polygons or run lengths, None when there are none or they were not asked for.
        annotation_ids: (N,) ids in the original annotations, None where the format has none.
    """

    path: Path
    image_id: int
    size: Size
    boxes: NDArray[np.floating]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    areas: NDArray[np.float32] | None = None
    segmentations: list[Segmentation] | None = None
    annotation_ids: NDArray[np.int64] | None = None

    @classmethod
    def of(
        cls,
        path: Path,
        image_id: int,
        size: Size,
        boxes: Sequence[Sequence[float]] | NDArray[np.floating],
        labels: Sequence[int],
        crowd: Sequence[bool] | None = None,
        segmentations: list[Segmentation] | None = None,
    ) -> Record:
        """From plain lists; without `crowd`, no box is one."""
        return cls(
            path,
            image_id,
            size,
            np.asarray(boxes, np.float64).reshape(-1, 4),
            np.asarray(labels, np.int64),
            np.zeros(len(labels), np.bool_) if crowd is None else np.asarray(crowd, np.bool_),
            segmentations=segmentations,
        )

    @property
    def is_empty(self) -> bool:
        """Whether no box trains: there is none, or only crowd regions."""
        return bool(self.crowd.all())

    def repaired(self, repairs: Repairs, name: Callable[[int], str]) -> Record:
        """The same with boxes clipped to the image, and without those that are no boxes in it.

        Args:
            repairs: counts what was done.
            name: where box i was read, for messages.
        """
        height, width = self.size
        with np.errstate(over="ignore", invalid="ignore"):
            boxes = self.boxes.astype(np.float32)
            clipped = boxes.clip(0, np.array([width, height] * 2, np.float32))
            sides, visible = boxes[:, 2:] - boxes[:, :2], clipped[:, 2:] - clipped[:, :2]
            if (sides > 0).all() and (boxes == clipped).all():
                return replace(self, boxes=boxes)
            problems = {
                "non-finite": ~np.isfinite(boxes).all(1),
                "inverted": (sides < 0).any(1),
                "zero-size": (sides == 0).any(1),
                "outside": (visible <= 0).any(1),
                "clipped": (np.abs(boxes - clipped) > TOLERANCE).any(1),
            }
        keep = np.ones(len(boxes), np.bool_)
        pending = keep.copy()
        for kind, found in problems.items():
            for index in np.flatnonzero(found & pending):
                repairs.add(kind, name(int(index)))
            pending &= ~found
            if kind != "clipped":
                keep &= ~found
        record = replace(self, boxes=clipped)
        return record if keep.all() else record._selected(keep)

    def _selected(self, keep: NDArray[np.bool_]) -> Record:
        arrays = ("boxes", "labels", "crowd", "areas", "annotation_ids")
        kept = {name: getattr(self, name)[keep] for name in arrays if getattr(self, name) is not None}
        if self.segmentations is not None:
            kept["segmentations"] = [self.segmentations[index] for index in np.flatnonzero(keep)]
        return replace(self, **kept)

    def masks(self) -> Tensor:
        """(N, H, W) bool, decoded from the segmentations.

        Raises:
            DataError: if there are none or one is malformed.
        """
        if self.segmentations is None:
            raise DataError(f"{self.path} has no segmentations: set load_masks=false")
        masks = np.zeros((len(self.boxes), *self.size), np.bool_)
        for index, segmentation in enumerate(self.segmentations):
            try:
                masks[index] = decode_mask(segmentation, self.size)
            except DataError as error:
                ids = self.annotation_ids
                name = f"object {index + 1}" if ids is None else f"annotation {ids[index]}"
                raise DataError(f"{name} of image {self.path}: {error}") from error
        return torch.from_numpy(masks)


@dataclass
class Repairs:
    """How many boxes were repaired ("clipped") or dropped ("non-finite", "inverted", "zero-size", "outside").

    Attributes:
        counts: boxes by kind.
        examples: where the first few of each kind were read.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, where: str) -> None:
        self.counts[kind] += 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < EXAMPLES:
            examples.append(where)

    @property
    def dropped(self) -> int:
        return self.counts.total() - self.counts["clipped"]

    def __bool__(self) -> bool:
        return self.counts.total() > 0

    def __str__(self) -> str:
        parts = []
        for kind, count in self.counts.items():
            verb = "to the image" if kind == "clipped" else "dropped"
            more = ", ..." if count > EXAMPLES else ""
            parts.append(f"{count} {kind} {verb} ({', '.join(self.examples[kind])}{more})")
        return "; ".join(parts) or "none"


class FileDataset:
    """Decodes the images of checked records; implements `DetectionDataset`.

    Args:
        records: one per image, in dataset order.
        categories: label k is `categories[k]`.
        load_masks: whether targets carry (N, H, W) masks; every record needs segmentations then.
        skip_empty: leaves out images without a box that trains.
        repairs: what was mended while the records were made; a summary is logged as one warning.
        source: where the annotations came from, for messages.

    Raises:
        DataError: if there is no record, an image id occurs twice, or the first image is missing or of another size
            than annotated (so that a wrong image folder is seen at once). Reading a sample raises it too.
    """

    def __init__(
        self,
        records: Sequence[Record],
        categories: Sequence[Category],
        *,
        load_masks: bool = False,
        skip_empty: bool = False,
        repairs: Repairs | None = None,
        source: str | Path = "the dataset",
    ) -> None:
        records = [record for record in records if not (skip_empty and record.is_empty)]
        if not records:
            raise DataError(f"{source} has no images: check the split, the file, and skip_empty")
        image_id, uses = Counter(record.image_id for record in records).most_common(1)[0]
        if uses > 1:
            raise DataError(f"{source}: image id {image_id} occurs {uses} times: ids must be unique")
        if load_masks and any(record.segmentations is None for record in records):
            raise DataError(f"{source} has images without segmentations: set load_masks=false")
        _check_size(records[0], image_size(records[0].path))
        self.records = records
        self.categories = list(categories)
        self.sizes = [record.size for record in self.records]
        self.load_masks = load_masks
        self.repairs = Repairs() if repairs is None else repairs
        if self.repairs:
            logger.warning("%s: boxes mended: %s", source, self.repairs)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self.records):
            raise IndexError(f"image {index} of {len(self.records)}")
        record = self.records[index]
        image = read_image(record.path)
        _check_size(record, (image.shape[1], image.shape[2]))
        target = Target(
            boxes=torch.from_numpy(record.boxes.astype(np.float32)),
            labels=torch.from_numpy(record.labels.copy()),
            crowd=torch.from_numpy(record.crowd.copy()),
            masks=record.masks() if self.load_masks else None,
            segmentations=record.segmentations if self.load_masks else None,
            area=None if record.areas is None else torch.from_numpy(record.areas.copy()),
            image_id=record.image_id,
            original_size=record.size,
            path=str(record.path),
        )
        return Sample(image, target)


def _check_size(record: Record, size: Size) -> None:
    if size != record.size:
        raise DataError(
            f"{record.path} has {size[0]} x {size[1]} pixels (H x W), but its annotations are for {record.size[0]} x "
            f"{record.size[1]}: use the annotated file (images are read without rotating them by EXIF orientation)"
        )
