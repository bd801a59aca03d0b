"""Annotations of images that lie in files, checked and repaired once, and the dataset that decodes them on demand."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dyndet.data.images import Header, read_header, read_image
from dyndet.data.masks import Segmentation, decode_mask
from dyndet.data.orientation import Seen, judge
from dyndet.data.quarantine import SKIP, Fault
from dyndet.data.units import check_units
from dyndet.errors import DataError
from dyndet.structures import Category, Sample, Size, Target, Truth

logger = logging.getLogger(__name__)

TOLERANCE = 0.1
"""Pixels by which a box may leave its image unreported: annotations are rounded."""

EXAMPLES = 3

LOOKED_AT = 200
"""Images of a set whose headers are read at once, where the annotations tell the sizes of all."""

WITHOUT_MASKS = "set data.masks=false (load_masks=False in Python)"

_KEPT = {"clipped": "to the image", "tiny": "(a side below 1 pixel) kept"}


@dataclass(frozen=True)
class Record:
    """Annotations of one image, which is not decoded.

    Attributes:
        path: the image file.
        image_id: id in the original annotations.
        size: (H, W) as annotated; of the upright image where annotations do not say.
        boxes: (N, 4) xyxy in pixels; float32 once repaired.
        labels: (N,) int64 in 0..K-1.
        crowd: (N,) bool.
        areas: (N,) annotated areas in square pixels, None where there are none.
        segmentations: N polygons or run lengths, None when there are none or they were not asked for.
        annotation_ids: (N,) ids in the original annotations, None where the format has none.
        truth: the objects as annotated, those included that are not fit for training; None before `repaired`.
        header: of the image file, where it has been read.
        sized: whether the annotations say for which size they are.
        mended: kind and place of every box that `repaired` counted.
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
    truth: Truth | None = None
    header: Header | None = None
    sized: bool = True
    mended: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(
        cls,
        path: Path,
        image_id: int,
        size: Size | Header,
        boxes: Sequence[Sequence[float]] | NDArray[np.floating],
        labels: Sequence[int],
        crowd: Sequence[bool] | None = None,
        segmentations: list[Segmentation] | None = None,
    ) -> Record:
        """From plain lists; without `crowd`, no box is one. A header stands for a size that annotations do not tell."""
        header = size if isinstance(size, Header) else None
        return cls(
            path,
            image_id,
            size.upright if isinstance(size, Header) else size,
            np.asarray(boxes, np.float64).reshape(-1, 4),
            np.asarray(labels, np.int64),
            np.zeros(len(labels), np.bool_) if crowd is None else np.asarray(crowd, np.bool_),
            segmentations=segmentations,
            header=header,
            sized=header is None,
        )

    @property
    def is_empty(self) -> bool:
        """Whether no box trains: there is none, or only crowd regions."""
        return bool(self.crowd.all())

    def repaired(self, repairs: Repairs, name: Callable[[int], str]) -> Record:
        """The same with boxes clipped to the image, and without those that are no boxes in it; `truth` keeps all.

        Args:
            repairs: counts what was done.
            name: where box i was read, for messages.
        """
        height, width = self.size
        with np.errstate(over="ignore", invalid="ignore"):
            boxes = self.boxes.astype(np.float32)
            clipped = boxes.clip(0, np.array([width, height] * 2, np.float32))
            sides, visible = boxes[:, 2:] - boxes[:, :2], clipped[:, 2:] - clipped[:, :2]
            truth = self.truth or self._as_annotated()
            if (sides >= 1).all() and (boxes == clipped).all():
                return replace(self, boxes=boxes, truth=truth)
            problems = {
                "non-finite": ~np.isfinite(boxes).all(1),
                "inverted": (sides < 0).any(1),
                "zero-size": (sides == 0).any(1),
                "outside": (visible <= 0).any(1),
                "clipped": (np.abs(boxes - clipped) > TOLERANCE).any(1),
                "tiny": (visible < 1).any(1),
            }
        keep = np.ones(len(boxes), np.bool_)
        pending = keep.copy()
        mended: list[tuple[str, str]] = []
        for kind, found in problems.items():
            for index in np.flatnonzero(found & pending):
                mended.append((kind, name(int(index))))
                repairs.add(*mended[-1])
            pending &= ~found
            if kind not in _KEPT:
                keep &= ~found
        if problems["non-finite"].any():  # which nothing can be compared with
            truth = truth[~problems["non-finite"]]
        record = replace(self, boxes=clipped, truth=truth, mended=tuple(mended))
        return record if keep.all() else record._selected(keep)

    def _as_annotated(self) -> Truth:
        boxes = self.boxes.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        return Truth(boxes, self.labels, self.crowd, self.areas, self.segmentations)

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
            raise DataError(f"{self.path} has no segmentations: {WITHOUT_MASKS}")
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
    """How many boxes were "clipped", dropped ("non-finite", "inverted", "zero-size", "outside") or are "tiny".

    Attributes:
        counts: boxes by kind.
        examples: where the first few of each kind were read.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[Record]) -> Repairs:
        """What was mended in these records alone."""
        repairs = cls()
        for record in records:
            for kind, where in record.mended:
                repairs.add(kind, where)
        return repairs

    def add(self, kind: str, where: str) -> None:
        self.counts[kind] += 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < EXAMPLES:
            examples.append(where)

    @property
    def dropped(self) -> int:
        return self.counts.total() - sum(self.counts[kind] for kind in _KEPT)

    def __bool__(self) -> bool:
        return self.counts.total() > 0

    def __str__(self) -> str:
        parts = []
        for kind, count in self.counts.items():
            verb = _KEPT.get(kind, "dropped")
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
        left_out: images that were left out because they or their annotations cannot be used; None where the first such
            is an error.
        tolerant: reads images whose last bytes are missing, too.

    Attributes:
        faults: those in `left_out`.
        upright: whether images are turned by their EXIF orientation where the annotated size does not tell (see
            `judge`); otherwise each is read as its annotated size says.

    Raises:
        DataError: if there is no record, an image id or a class name occurs twice, all boxes are in another unit, or
            the first image is missing or of another size than annotated (so that a wrong image folder is seen at
            once). Reading a sample raises it too.
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
        left_out: Sequence[Fault] | None = None,
        tolerant: bool = False,
    ) -> None:
        self.faults = tuple(left_out or ())
        if self.faults and not records:
            count, example = len(self.faults), self.faults[0].reason
            raise DataError(f"{source}: none of its {count} images can be used, for example {example}: mend the data")
        records = [record for record in records if not (skip_empty and record.is_empty)]
        if not records:
            raise DataError(f"{source} has no images: check the split, the file, and data.skip_empty")
        image_id, uses = Counter(record.image_id for record in records).most_common(1)[0]
        if uses > 1:
            raise DataError(f"{source}: image id {image_id} occurs {uses} times: ids must be unique")
        if load_masks and any(record.segmentations is None for record in records):
            raise DataError(f"{source} has images without segmentations: {WITHOUT_MASKS}")
        _check_categories(categories, source)
        _check_first(records, skip=left_out is not None)
        check_units(records, source)
        self.records = records
        self.categories = list(categories)
        self.sizes = [record.size for record in self.records]
        self.load_masks = load_masks
        self.repairs = Repairs() if repairs is None else repairs
        self.source = source
        self.tolerant = tolerant
        self.upright = judge(_looked_at(records), source, len(records))
        if self.repairs:
            logger.warning("%s: boxes mended: %s; evaluation takes them as annotated", source, self.repairs)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self.records):
            raise IndexError(f"image {index} of {len(self.records)}")
        record, image = self.records[index], self.image(index)
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
            truth=record.truth,
        )
        return Sample(image, target)

    def image(self, index: int) -> Tensor:
        """Image `index` without its annotations, uint8 (3, H, W)."""
        record = self.records[index]
        annotated = record.size if record.sized else None
        image = read_image(record.path, annotated=annotated, upright=self.upright, tolerant=self.tolerant)
        _check_size(record, (image.shape[1], image.shape[2]))
        return image


def _looked_at(records: Sequence[Record]) -> list[Seen]:
    """Headers that are known, and some of the others, spread evenly."""
    count = len(records)
    places = range(count) if count <= LOOKED_AT else [i * count // LOOKED_AT for i in range(LOOKED_AT)]
    known = {place: record.header for place, record in enumerate(records) if record.header is not None}
    for place in places:
        try:
            known[place] = known.get(place) or read_header(records[place].path)
        except DataError:  # said when it is read
            continue
    return [
        Seen(records[place].path, header, records[place].size if records[place].sized else None)
        for place, header in sorted(known.items())
    ]


def _check_first(records: Sequence[Record], *, skip: bool) -> None:
    """Looks at the first image; when faults are skipped, at the first that can be used."""
    last: DataError | None = None
    for record in records:
        try:
            header = record.header or read_header(record.path)
            return _check_size(record, header.upright if header.reads_upright(record.size) else header.stored)
        except DataError as error:
            if not skip:
                raise type(error)(f"{error}; {SKIP}", error.faults) from error
            last = error
    raise DataError(f"none of the {len(records)} images can be used, for example {last}")


def _check_size(record: Record, size: Size) -> None:
    if size != record.size:
        orientation = read_header(record.path).orientation
        turned = f", nor without its EXIF orientation {orientation}" if orientation != 1 else ""
        raise DataError(
            f"{record.path} has {size[0]} x {size[1]} pixels (H x W), but its annotations are for {record.size[0]} x "
            f"{record.size[1]}{turned}: use the annotated file"
        )


def _check_categories(categories: Sequence[Category], source: str | Path) -> None:
    if not categories:
        raise DataError(f"{source} has no categories: name at least one")
    seen: dict[str, int] = {}
    for category in categories:
        if category.id < 0:
            raise DataError(f"{source}: category {category.name!r} has id {category.id}: ids must not be negative")
        if not category.name.strip():
            raise DataError(f"{source}: category {category.id} has no name: give it one")
        if category.name in seen:
            raise DataError(
                f"{source}: categories {seen[category.name]} and {category.id} are both called {category.name!r}: "
                "names must be unique"
            )
        seen[category.name] = category.id
