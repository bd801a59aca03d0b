"""A cheap look at a split before it is used: whether anything is left to learn, and to see."""

from __future__ import annotations

import logging

from torch import Tensor

from dyndet.data.dataset import DetectionDataset
from dyndet.data.records import FileDataset, Repairs
from dyndet.errors import DataError

logger = logging.getLogger(__name__)

LOOKED_AT = 8
"""Images that are decoded."""

LEAST_CONTRAST = 20
"""Of 255: a 12-bit image in a 16-bit file spans 15."""

_REASONS = {
    "inverted": "their ends are exchanged, or given as x1 y1 x2 y2 where x y width height is expected, or the reverse",
    "outside": "they may be in pixels where 0..1 is expected, or belong to larger images",
    "zero-size": "they may be in 0..1 where whole pixels are expected",
    "non-finite": "they hold values that are no numbers",
}


def refuse_useless(dataset: DetectionDataset, name: str) -> None:
    """Refuses a split of files whose boxes were all dropped, and one without any box for training.

    Raises:
        DataError: with counts, examples and the likely reason.
    """
    if not isinstance(dataset, FileDataset) or not all(record.is_empty for record in dataset.records):
        return
    repairs = dataset.repairs
    if repairs.dropped:
        raise DataError(
            f"{dataset.source}: no box of the {name} split is usable: {repairs}; {_reason(repairs)}: correct them"
        )
    if name == "train":
        raise DataError(
            f"{dataset.source}: none of the {len(dataset)} images of the train split has a box to learn from: check "
            "that the annotations belong to these images"
        )


def warn_of_flat(dataset: DetectionDataset, name: str) -> None:
    """Warns when most of a few images, spread over the split, have next to no contrast."""
    if not isinstance(dataset, FileDataset):
        return
    count = min(LOOKED_AT, len(dataset))
    seen = {place: _read(dataset, place) for place in (i * len(dataset) // count for i in range(count))}
    ranges = {place: (int(image.min()), int(image.max())) for place, image in seen.items() if image is not None}
    flat = [place for place, (low, high) in ranges.items() if high - low < LEAST_CONTRAST]
    if 2 * len(flat) > len(ranges):
        low, high = ranges[flat[0]]
        logger.warning(
            "%s: %d of %d images of the %s split that were looked at have next to no contrast (for example %s: values "
            "%d to %d of 0..255): 16-bit files count as 0..65535, so 12-bit values must be multiplied by 16",
            dataset.source, len(flat), len(ranges), name, dataset.records[flat[0]].path, low, high,
        )  # fmt: skip


def _reason(repairs: Repairs) -> str:
    most = max(_REASONS, key=lambda kind: repairs.counts[kind])
    return _REASONS[most]


def _read(dataset: FileDataset, place: int) -> Tensor | None:
    try:
        return dataset.image(place)
    except DataError:  # said when it is trained on
        return None
