"""Precision, recall and F1 over the score from which on detections count."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dyndet.metrics.matching import Array, Matches

RECALLS = np.linspace(0, 1, 101)
"""Where COCO reads precision."""


@dataclass(frozen=True)
class Curve:
    """What holds for the detections down to each one, M of them by descending score.

    Attributes:
        scores: (M,) of the detections.
        precision: (M,) share of right ones.
        recall: (M,) share of the objects that were found.
        objects: how many there are.
    """

    scores: Array
    precision: Array
    recall: Array
    objects: int

    def average_precision(self) -> float:
        """COCO's: the mean of `interpolated`; nan without objects."""
        return float(self.interpolated().mean()) if self.objects else math.nan

    def interpolated(self) -> Array:
        """(101,) the best precision at each of `RECALLS` or beyond; 0 where recall never gets there."""
        best = np.maximum.accumulate(self.precision[::-1])[::-1]
        return np.append(best, 0.0)[np.searchsorted(self.recall, RECALLS, side="left")]

    def f1(self) -> Array:
        """(M,) harmonic mean of precision and recall."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / np.where(total > 0, total, 1)

    def f1_at(self, thresholds: Array) -> Array:
        """F1 of the detections with at least these scores."""
        counted = np.searchsorted(-self.scores, -np.asarray(thresholds), side="right")
        return np.append(0.0, self.f1())[counted]

    def best(self) -> Best:
        """The score from which on F1 is highest; 1 where nothing is ever right."""
        if not (self.recall > 0).any():
            return Best(1.0, 0.0, 0.0, 0.0)
        ends = np.append(self.scores[1:] < self.scores[:-1], True)  # a threshold takes all of one score or none
        row = int(np.argmax(np.where(ends, self.f1(), -1.0)))
        return Best(*(float(x[row]) for x in (self.scores, self.f1(), self.precision, self.recall)))


@dataclass(frozen=True)
class Best:
    """What the best threshold gives."""

    threshold: float
    f1: float
    precision: float
    recall: float


def class_curve(matches: Matches, label: int) -> Curve:
    """The curve of one class."""
    rows = matches.label == label
    return curve_of(matches.found[rows] >= 0, matches.score[rows], int(matches.objects[label]), matches.ignored[rows])


def curve_of(hits: NDArray[np.bool_], scores: Array, objects: int, ignored: NDArray[np.bool_] | None = None) -> Curve:
    """The curve of detections by descending score.

    Args:
        hits: (M,) which are right.
        scores: (M,) descending.
        objects: how many could have been found.
        ignored: (M,) detections that are left out.
    """
    if ignored is not None:
        hits, scores = hits[~ignored], scores[~ignored]
    right = hits.cumsum()
    return Curve(scores, right / np.arange(1, len(hits) + 1), right / max(objects, 1), objects)


def mean_average_precision(curves: list[Curve]) -> float:
    """Mean over the classes that have objects; nan when none has."""
    values = [curve.average_precision() for curve in curves if curve.objects]
    return sum(values) / len(values) if values else math.nan
