"""All checks of a data set, in order of their cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from dyndet.checkup.annotations import check_annotations
from dyndet.checkup.finding import Finding, ranked
from dyndet.checkup.levels import check_levels, check_sizes, seen_boxes, share_levels
from dyndet.checkup.looks import check_pictures, look_at
from dyndet.checkup.split import Split, annotations_at_hand, read_splits
from dyndet.checkup.surroundings import check_folders, missing_files
from dyndet.data.dataset import DetectionDataset
from dyndet.data.transforms import Transform
from dyndet.errors import DataError
from dyndet.models.detectors.base import Detector

MOST_LINES = 5
"""Before a training."""
_SAID_BY_READERS = ("mended boxes",)


def examine(
    splits: Sequence[Split],
    detector: Detector | None = None,
    transform: Transform | None = None,
    *,
    images: int | None = None,
    track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[Finding]:
    """What there is to say about a data set, the worst first.

    Args:
        splits: of the data set.
        detector: that is to learn it; None leaves out checks of sizes.
        transform: of evaluation, which makes what the detector sees; needed with `detector`.
        images: so many of each split are opened, evenly spread; None opens all.
        track: wraps the slow part, to show its progress.
    """
    findings = check_annotations(splits) + missing_files(splits) + check_folders(splits)
    if detector is not None and transform is not None:
        for split in (split for split in splits if split.name == "train"):
            seen = seen_boxes(split, transform)
            findings += check_sizes(split, seen, detector.strides)
            shares = share_levels(seen, detector)
            findings += [] if shares is None else check_levels(split, shares)
    return ranked(findings + check_pictures(look_at(splits, images=images, track=track)))


def check_before_training(train: DetectionDataset, val: DetectionDataset) -> list[str]:
    """What annotations alone say that is no mere note, a line each; of data sets that hold them without their images.

    Raises:
        DataError: if there is nothing left to learn.
    """
    if not all(annotations_at_hand(dataset) for dataset in (train, val)):
        return []
    findings = ranked(check_annotations(read_splits(train, val)))
    for finding in findings:
        if finding.check == "nothing to learn" and finding.text.startswith("no box of the train"):
            raise DataError(f"{finding.text}: {finding.advice}")
    shown = [item for item in findings if item.severity != "note" and item.check not in _SAID_BY_READERS]
    lines = [
        f"{item.severity}: {item.text} ({item.places[0].where})" if item.places else f"{item.severity}: {item.text}"
        for item in shown
    ]
    more = len(lines) - MOST_LINES
    return [*lines[:MOST_LINES], *([f"and {more} more: dyndet doctor shows all"] if more > 0 else [])]


def overview(splits: Sequence[Split]) -> list[str]:
    """What is there: a line per split, and one on the classes."""
    lines = []
    for split in splits:
        objects = int((~split.crowd).sum())
        crowd = f", {int(split.crowd.sum())} crowd regions" if split.crowd.any() else ""
        lines.append(f"{split.name:6s} {len(split)} images, {objects} boxes{crowd}, {_size_range(split)}")
    counts = sum(
        (np.bincount(split.labels[~split.crowd], minlength=len(split.categories)) for split in splits),
        np.zeros(len(splits[0].categories), np.int64),
    )
    names = [f"{item.name} {count}" for item, count in zip(splits[0].categories, counts, strict=True)]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return [*lines, f"{len(names)} class{'es' * (len(names) != 1)}: {', '.join(names[:20])}{more}"]


def _size_range(split: Split) -> str:
    if not len(split):
        return "no sizes"
    low, high = split.sizes.min(0), split.sizes.max(0)
    first = f"{low[1]} x {low[0]}"
    return f"{first} pixels" if (low == high).all() else f"{first} to {high[1]} x {high[0]} pixels"
