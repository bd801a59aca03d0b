"""Checks of annotations alone: cheap enough to run before every training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dyndet.checkup.finding import Finding, Severity, first_few, many
from dyndet.checkup.split import Split

TINY = 2.0
"""Boxes with a side below this many pixels on disk are counted."""
SAME = 0.95
"""Intersection over union from which two boxes of one class mark one object."""
FEW = 10
"""Boxes below which a class of the training split is hardly learned."""


def check_annotations(splits: Sequence[Split]) -> list[Finding]:
    """All of them, over the splits of one data set; an empty list says that nothing was found."""
    findings: list[Finding] = []
    for split in splits:
        for check in (nothing_to_learn, dropped_boxes, tiny_boxes, repeated_boxes, one_class_only, empty_images):
            findings += check(split)
    return findings + missing_classes(splits) + same_files(splits)


def nothing_to_learn(split: Split) -> list[Finding]:
    """A split without a box that counts."""
    if (~split.crowd).any():
        return []
    dropped = f"; {split.repairs.dropped} were dropped when read: {split.repairs}" if split.repairs.dropped else ""
    verb = "trains" if split.name == "train" else "is evaluated"
    return [
        Finding(
            "nothing to learn",
            "error",
            f"no box of the {split.name} split {verb} ({len(split)} images, {int(split.crowd.sum())} crowd regions)"
            f"{dropped}",
            len(split),
            "check the paths of the labels, their format and units",
        )
    ]


def dropped_boxes(split: Split) -> list[Finding]:
    """What the reader had to drop or clip."""
    repairs = split.repairs
    if not repairs:
        return []
    share = repairs.dropped / max(1, repairs.dropped + len(split.boxes))
    severity: Severity = "error" if share > 0.2 else "warning" if repairs.dropped else "note"
    return [
        Finding(
            "mended boxes",
            severity,
            f"{split.name}: {repairs}",
            repairs.counts.total(),
            "correct them in the labels: dropped boxes are objects that the detector learns to overlook"
            if repairs.dropped
            else "fine where objects go on beyond the image",
        )
    ]


def tiny_boxes(split: Split) -> list[Finding]:
    sides = split.boxes[:, 2:] - split.boxes[:, :2]
    tiny = np.flatnonzero((sides < TINY).any(1) & ~split.crowd)
    if not len(tiny):
        return []
    share = len(tiny) / len(split.boxes)
    return [
        Finding(
            "tiny boxes",
            "error" if share > 0.5 else "warning",
            f"{split.name}: {many(len(tiny), 'box')} ({share:.1%}) with a side below {TINY:g} pixels",
            len(tiny),
            "boxes in 0..1 where pixels are meant, or slips of the mouse",
            first_few([split.at_box(box) for box in tiny.tolist()]),
        )
    ]


def repeated_boxes(split: Split) -> list[Finding]:
    """Two boxes of one class on one object, and one box with two classes."""
    same, other = _overlapping(split)
    findings = []
    if len(same):
        findings.append(
            Finding(
                "duplicate boxes",
                "warning",
                f"{split.name}: {many(len(same), 'pair')} of boxes of one class that overlap by {SAME:.0%} or more",
                len(same),
                "remove one of each: the second one counts as missed in evaluation",
                first_few([split.at_box(second, "again") for _, second in same.tolist()]),
            )
        )
    if len(other):
        findings.append(
            Finding(
                "boxes with two classes",
                "warning",
                f"{split.name}: {many(len(other), 'pair')} of boxes of two classes that overlap by {SAME:.0%} or more",
                len(other),
                "one of the two labels is wrong, unless objects have several classes",
                first_few([split.at_box(second, f"also {_name(split, first)}") for first, second in other.tolist()]),
            )
        )
    return findings


def one_class_only(split: Split) -> list[Finding]:
    """How unevenly classes are spread in training."""
    if split.name != "train" or len(split.categories) < 2:
        return []
    counts = np.bincount(split.labels[~split.crowd], minlength=len(split.categories))
    rare = [split.categories[label].name for label in np.flatnonzero((counts > 0) & (counts < FEW))]
    findings = []
    if rare:
        findings.append(
            Finding(
                "rare classes",
                "warning",
                f"train: fewer than {FEW} boxes of {_listed(rare)}",
                len(rare),
                "label more of them, or leave the class out (data.classes=[...])",
            )
        )
    shown = counts[counts > 0]
    if len(shown) > 1 and shown.max() >= 100 * shown.min():
        most, least = (split.categories[int(pick)].name for pick in (counts.argmax(), _least(counts)))
        findings.append(
            Finding(
                "uneven classes",
                "note",
                f"train: {shown.max()} boxes of {most}, {shown.min()} of {least}",
                1,
                "read AP per class, not the mean alone",
            )
        )
    return findings


def empty_images(split: Split) -> list[Finding]:
    """Images without a box: negatives on purpose, or labels that were not found."""
    full = np.zeros(len(split), np.bool_)
    full[split.image[~split.crowd]] = True
    empty = np.flatnonzero(~full)
    if not len(empty) or not full.any():
        return []
    share = len(empty) / len(split)
    return [
        Finding(
            "images without boxes",
            "warning" if share > 0.5 else "note",
            f"{split.name}: {len(empty)} of {len(split)} images have no box",
            len(empty),
            "fine if nothing is in them; otherwise their labels were not found",
            first_few([split.at_image(int(index)) for index in empty]),
        )
    ]


def missing_classes(splits: Sequence[Split]) -> list[Finding]:
    """Classes that one split has and another lacks."""
    present = {split.name: set(split.labels[~split.crowd].tolist()) for split in splits}
    if not all(present.values()):
        return []  # said elsewhere
    findings = []
    for split in splits:
        others = set().union(*(labels for name, labels in present.items() if name != split.name))
        names = [split.categories[label].name for label in sorted(others - present[split.name])]
        if names:
            findings.append(
                Finding(
                    "classes missing in a split",
                    "warning",
                    f"{split.name}: no box of {_listed(names)}, which the other split has",
                    len(names),
                    "never seen in training" if split.name == "train" else "its AP cannot be measured: split again",
                )
            )
    absent = [
        item.name for label, item in enumerate(splits[0].categories) if not any(label in p for p in present.values())
    ]
    if absent:
        findings.append(
            Finding(
                "classes without boxes",
                "note",
                f"no split has a box of {_listed(absent)}",
                len(absent),
                "they cost a little compute; data.classes=[...] leaves them out",
            )
        )
    return findings


def same_files(splits: Sequence[Split]) -> list[Finding]:
    """Images that are listed twice, or in two splits."""
    seen: dict[str, tuple[Split, int]] = {}
    twice, leaked = [], []
    for split in splits:
        for index, path in enumerate(split.paths):
            if not path:
                continue
            before = seen.setdefault(path, (split, index))
            if before[0] is not split:
                leaked.append(split.at_image(index, f"also in {before[0].name}"))
            elif before[1] != index:
                twice.append(split.at_image(index, "listed twice"))
    findings = []
    if leaked:
        text = f"{many(len(leaked), 'image')} of val in train as well"
        findings.append(
            Finding("leaks between splits", "error", text, len(leaked), "the AP would be too good", first_few(leaked))
        )
    if twice:
        text = f"{many(len(twice), 'image')} listed twice in one split"
        findings.append(Finding("images listed twice", "warning", text, len(twice), "list them once", first_few(twice)))
    return findings


def _overlapping(split: Split) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(P, 2) pairs of boxes that overlap by `SAME`, of the same class and of different ones.

    Sides of such boxes differ by 5 % at most, so that after sorting by area in each image few pairs are compared.
    """
    kept = np.flatnonzero(~split.crowd)
    boxes, image = split.boxes[kept], split.image[kept]
    areas = (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(1)
    order = np.lexsort((areas, image))
    boxes, image, areas, kept = boxes[order], image[order], areas[order], kept[order]
    pairs = []
    for step in range(1, len(kept)):
        near = (image[step:] == image[:-step]) & (areas[:-step] >= SAME * areas[step:])
        first = np.flatnonzero(near)
        if not len(first):
            break
        second = first + step
        common = np.minimum(boxes[first, 2:], boxes[second, 2:]) - np.maximum(boxes[first, :2], boxes[second, :2])
        shared = common.clip(0).prod(1)
        hit = shared >= SAME * np.maximum(areas[first] + areas[second] - shared, 1e-9)
        pairs.append(np.stack([kept[first[hit]], kept[second[hit]]], 1))
    found = np.sort(np.concatenate(pairs), 1) if pairs else np.zeros((0, 2), np.int64)
    alike = split.labels[found[:, 0]] == split.labels[found[:, 1]]
    return found[alike], found[~alike]


def _least(counts: NDArray[np.int64]) -> int:
    return int(np.where(counts > 0, counts, counts.max() + 1).argmin())


def _name(split: Split, box: int) -> str:
    return split.categories[split.labels[box]].name


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
