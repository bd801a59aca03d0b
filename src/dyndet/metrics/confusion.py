"""What objects were taken for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dyndet.metrics.matching import Indices, overlaps
from dyndet.structures import Detections, Target


def confusion_matrix(
    detections: Sequence[Detections], targets: Sequence[Target], thresholds: Sequence[float], *, iou: float = 0.5
) -> Indices:
    """(K + 1, K + 1) counts: row = annotated class, column = detected class; the last of either is the background.

    A detection and an object that overlap enough are a pair, each in one pair at most: those of one class first, then
    by IoU. What is in no pair was missed, or is a detection of background. Detections inside a crowd do not count.

    Args:
        detections: one per image.
        targets: likewise.
        thresholds: score from which on a detection counts, of each of the K classes.
        iou: from which on a detection and an object belong together.
    """
    nothing = len(thresholds)
    counts = np.zeros((nothing + 1, nothing + 1), np.int64)
    for found, target in zip(detections, targets, strict=True):
        labels, annotated, crowd = (x.cpu().numpy() for x in (found.labels, target.labels, target.crowd))
        shared = overlaps(found, target)
        counted = found.scores.cpu().double().numpy() >= np.asarray(thresholds)[labels]
        rows, columns = np.nonzero((shared >= iou) & counted[:, None] & ~crowd[None])
        alike = labels[rows] == annotated[columns]
        seen, taken = set[int](), set[int]()
        for pair in np.lexsort((-shared[rows, columns], ~alike)):
            row, column = int(rows[pair]), int(columns[pair])
            if row not in seen and column not in taken:
                seen.add(row)
                taken.add(column)
                counts[annotated[column], labels[row]] += 1
        inside = (shared[:, crowd] >= iou).any(1)
        for row in np.flatnonzero(counted & ~inside):
            counts[nothing, labels[row]] += row not in seen
        for column in np.flatnonzero(~crowd):
            counts[annotated[column], nothing] += column not in taken
    return counts
