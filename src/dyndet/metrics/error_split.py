"""Errors by kind, and how much AP each kind costs: Bolya et al. 2020, TIDE (arXiv 2008.08115)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dyndet.metrics.curves import class_curve
from dyndet.metrics.matching import Indices, Matches, match, overlaps
from dyndet.structures import Detections, Target

KINDS = {
    "classification": "right place, wrong class",
    "localisation": "right class, overlaps too little",
    "both": "wrong class, and overlaps too little",
    "duplicate": "the object had been found already",
    "background": "nothing there",
    "missed": "an object that no detection comes near",
}
"""What each kind of error means."""


@dataclass(frozen=True)
class Mistake:
    """One error.

    Attributes:
        kind: one of `KINDS`.
        image: index of the image.
        score: of the detection; 0 of a missed object.
        row: of the detection in the matches; -1 for a missed object.
        detection: index among those of the image; -1 for a missed object.
        object: index of the object that it is about; -1 for background.
        label: the detected class; of a missed object its own.
    """

    kind: str
    image: int
    score: float
    row: int
    detection: int
    object: int
    label: int


def find_mistakes(
    matches: Matches,
    detections: Sequence[Detections],
    targets: Sequence[Target],
    *,
    iou: float = 0.5,
    near: float = 0.1,
) -> list[Mistake]:
    """Every false detection by descending score, then every missed object that none of them explains.

    Args:
        matches: of these detections and targets, or some rows of them.
        detections: one per image.
        targets: likewise.
        iou: as in `match`.
        near: overlaps below it are with background.
    """
    shared = [_without_crowd(found, target) for found, target in zip(detections, targets, strict=True)]
    mistakes: list[Mistake] = []
    for row in np.flatnonzero((matches.found < 0) & ~matches.ignored).tolist():
        image, index, label = int(matches.image[row]), int(matches.detection[row]), int(matches.label[row])
        kind, thing = _kind(shared[image][index], targets[image].labels.cpu().numpy() == label, iou, near)
        mistakes.append(Mistake(kind, image, float(matches.score[row]), row, index, thing, label))
    # An object that a wrong class or a poor box stands for was seen: it is that error, not a missed one.
    seen = {(item.image, item.object) for item in mistakes if item.kind in ("classification", "localisation")}
    seen |= set(zip(matches.image.tolist(), matches.found.tolist(), strict=True))
    for image, target in enumerate(targets):
        things = [i for i in np.flatnonzero(~target.crowd.cpu().numpy()).tolist() if (image, i) not in seen]
        mistakes += [Mistake("missed", image, 0.0, -1, -1, i, int(target.labels[i])) for i in things]
    return mistakes


def ap_gains(matches: Matches, mistakes: Sequence[Mistake], targets: Sequence[Target]) -> dict[str, float]:
    """How much AP would rise if the errors of one kind alone were gone, for every kind.

    A wrong class or box is put right where its object is still to be found, other detections vanish; missed objects
    are no longer asked for.

    Args:
        matches: that the mistakes are in.
        mistakes: see `find_mistakes`.
        targets: one per image.
    """
    classes = np.flatnonzero(matches.objects)
    before = _ap(matches, classes)
    # Binning by recall can cost a little where an error was put right.
    return {kind: max(0.0, _ap(_mended(matches, mistakes, targets, kind), classes) - before) for kind in KINDS}


def split_errors(
    detections: Sequence[Detections], targets: Sequence[Target], num_classes: int
) -> tuple[list[Mistake], dict[str, float]]:
    """The mistakes at IoU 0.5, and what each kind costs."""
    matches = match(detections, targets, num_classes)
    mistakes = find_mistakes(matches, detections, targets)
    return mistakes, ap_gains(matches, mistakes, targets)


def _kind(shared: NDArray[np.float64], alike: NDArray[np.bool_], iou: float, near: float) -> tuple[str, int]:
    """Kind and object of a false detection, from its overlaps and which objects are of its class; TIDE's order."""
    same, other = np.where(alike, shared, -1.0), np.where(alike, -1.0, shared)
    if not shared.size or shared.max() < near:
        return "background", -1
    if near <= same.max() < iou:
        return "localisation", int(same.argmax())
    if other.max() >= iou:
        return "classification", int(other.argmax())
    if same.max() >= iou:
        return "duplicate", int(same.argmax())
    return "both", int(other.argmax())


def _mended(matches: Matches, mistakes: Sequence[Mistake], targets: Sequence[Target], kind: str) -> Matches:
    found, label, objects = matches.found.copy(), matches.label.copy(), matches.objects.copy()
    keep = np.ones(len(found), np.bool_)
    done = set(zip(matches.image.tolist(), matches.found.tolist(), strict=True))
    for item in (item for item in mistakes if item.kind == kind):
        if kind == "missed":
            objects[item.label] -= 1
        elif kind in ("classification", "localisation") and (item.image, item.object) not in done:
            done.add((item.image, item.object))
            found[item.row], label[item.row] = item.object, int(targets[item.image].labels[item.object])
        else:
            keep[item.row] = False
    return replace(matches, found=found, label=label, objects=objects)[keep]


def _ap(matches: Matches, classes: Indices) -> float:
    """Mean over these classes; one that has no objects left has 0, as in TIDE."""
    values = [class_curve(matches, label).average_precision() for label in classes.tolist()]
    return float(np.nan_to_num(values).mean()) if values else 0.0


def _without_crowd(found: Detections, target: Target) -> NDArray[np.float64]:
    return np.where(target.crowd.cpu().numpy()[None], -1.0, overlaps(found, target))
