"""Which detection found which object, at one IoU, as COCO matches them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dyndet.metrics.export import original_xywh, to_xywh
from dyndet.structures import Detections, Target

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

MOST = 100
"""Detections per image and class that count, as in COCO."""


@dataclass(frozen=True)
class Matches:
    """M detections of many images by descending score; equal scores in the order of the images' ids.

    Attributes:
        image: (M,) index of the image.
        detection: (M,) index among the detections of that image.
        label: (M,) class.
        score: (M,) in 0..1.
        found: (M,) index of the object among those of the image; -1 for none.
        ignored: (M,) bool, found a crowd region: neither right nor wrong.
        objects: (K,) how many there are of each class, crowd regions left out.
    """

    image: Indices
    detection: Indices
    label: Indices
    score: Array
    found: Indices
    ignored: NDArray[np.bool_]
    objects: Indices

    def __getitem__(self, rows: NDArray[np.bool_]) -> Matches:
        """Some of the detections, of the same objects."""
        return Matches(
            image=self.image[rows],
            detection=self.detection[rows],
            label=self.label[rows],
            score=self.score[rows],
            found=self.found[rows],
            ignored=self.ignored[rows],
            objects=self.objects,
        )


def match(
    detections: Sequence[Detections], targets: Sequence[Target], num_classes: int, *, iou: float = 0.5
) -> Matches:
    """The best detection chooses first, each the object of its class that it overlaps most and that is still free.

    Args:
        detections: one per image, in pixels of the image on disk, by descending score.
        targets: likewise.
        num_classes: K.
        iou: from which on an object counts as found.
    """
    rows: list[tuple[int, int, int, float, int, bool]] = []
    objects = np.zeros(num_classes, np.int64)
    for image in sorted(range(len(targets)), key=lambda index: targets[index].image_id):
        target, boxes = targets[image], detections[image]
        crowd, annotated = target.crowd.cpu().numpy(), target.labels.cpu().numpy()
        labels, scores = boxes.labels.cpu().numpy(), boxes.scores.cpu().double().numpy()
        objects += np.bincount(annotated[~crowd], minlength=num_classes)
        shared = overlaps(boxes, target)
        for label in np.unique(labels):
            mine, theirs = np.flatnonzero(labels == label), np.flatnonzero(annotated == label)
            mine = mine[np.argsort(-scores[mine], kind="stable")][:MOST]
            chosen = _choose(shared[np.ix_(mine, theirs)], crowd[theirs], min(iou, 1 - 1e-10))
            for index, choice in zip(mine.tolist(), chosen, strict=True):
                thing = -1 if choice < 0 else int(theirs[choice])
                rows.append((image, index, int(label), float(scores[index]), thing, thing >= 0 and bool(crowd[thing])))
    rows.sort(key=lambda row: -row[3])  # stable
    kinds = {"image": "i8", "detection": "i8", "label": "i8", "score": "f8", "found": "i8", "ignored": "?"}
    columns = np.array(rows, dtype=list(kinds.items()))
    return Matches(**{name: columns[name] for name in kinds}, objects=objects)


def overlaps(found: Detections, target: Target) -> Array:
    """(M, N) IoU of detections and objects; with a crowd region the share of the detection that lies in it."""
    one = to_xywh(found.boxes).numpy()[:, None]
    other = original_xywh(target, target.original_size).numpy()[None]
    ends = np.minimum(one[..., :2] + one[..., 2:], other[..., :2] + other[..., 2:])
    sides = ends - np.maximum(one[..., :2], other[..., :2])
    shared = np.where((sides > 0).all(-1), sides.prod(-1), 0.0)
    area, annotated = one[..., 2:].prod(-1), other[..., 2:].prod(-1)
    crowd = target.crowd.cpu().numpy()[None]
    return shared / np.maximum(np.where(crowd, area, area + annotated - shared), np.finfo(np.float64).tiny)


def _choose(shared: Array, crowd: NDArray[np.bool_], iou: float) -> list[int]:
    """The object of every detection, in their order; crowds are a last resort, and never taken."""
    chosen = [-1] * len(shared)
    free = np.ones(len(crowd), np.bool_)
    for row in np.flatnonzero((shared >= iou).any(1)) if shared.size else ():
        for allowed in (free & ~crowd, crowd):
            values = np.where(allowed & (shared[row] >= iou), shared[row], -1.0)[::-1]  # the last of equals, as COCO
            best = len(crowd) - 1 - int(values.argmax())
            if values.max() > 0:
                chosen[row] = best
                free[best] = False
                break
    return chosen
