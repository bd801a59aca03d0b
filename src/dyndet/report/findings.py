"""What can be said about a validation, computed once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dyndet.metrics.curves import Best, Curve, class_curve
from dyndet.metrics.error_split import Mistake, ap_gains, find_mistakes
from dyndet.metrics.matching import Matches, match
from dyndet.metrics.validation import Validation
from dyndet.structures import Detections, Target


@dataclass(frozen=True)
class Score:
    """How well one image went, at the best thresholds.

    Attributes:
        hits: indices of the detections that are right.
        faults: of those that are wrong.
        lost: indices of the objects that were not found.
    """

    hits: list[int]
    faults: list[int]
    lost: list[int]

    @property
    def f1(self) -> float:
        """1 where there was nothing to find and nothing was found."""
        total = 2 * len(self.hits) + len(self.faults) + len(self.lost)
        return 2 * len(self.hits) / total if total else 1.0

    @property
    def errors(self) -> int:
        return len(self.faults) + len(self.lost)


class Findings:
    """Curves, thresholds, mistakes and single images of a validation, at IoU 0.5.

    Args:
        validation: as read from a run.
    """

    def __init__(self, validation: Validation) -> None:
        self.validation = validation
        self.names = [category.name for category in validation.categories]
        self.targets: list[Target] = validation.targets
        self.detections: list[Detections] = validation.detections

    @cached_property
    def matches(self) -> Matches:
        return match(self.detections, self.targets, len(self.names))

    @cached_property
    def curves(self) -> list[Curve]:
        return [class_curve(self.matches, label) for label in range(len(self.names))]

    @cached_property
    def best(self) -> list[Best]:
        return [curve.best() for curve in self.curves]

    @cached_property
    def thresholds(self) -> list[float]:
        """Of every class: the score with the best F1."""
        return [best.threshold for best in self.best]

    @cached_property
    def counted(self) -> Matches:
        """The detections that reach the best threshold of their class."""
        return self.matches[self.matches.score >= np.asarray(self.thresholds)[self.matches.label]]

    @cached_property
    def gains(self) -> dict[str, float]:
        """AP50 lost to each kind of error."""
        mistakes = find_mistakes(self.matches, self.detections, self.targets)
        return ap_gains(self.matches, mistakes, self.targets)

    @cached_property
    def counted_mistakes(self) -> list[Mistake]:
        """Mistakes of the detections that reach the best threshold, and what they miss."""
        return find_mistakes(self.counted, self.detections, self.targets)

    @cached_property
    def scores(self) -> list[Score]:
        """Every image at the best thresholds."""
        counted = self.counted
        scores = [Score([], [], []) for _ in self.targets]
        for image, index, found, ignored in zip(
            counted.image.tolist(),
            counted.detection.tolist(),
            counted.found.tolist(),
            counted.ignored.tolist(),
            strict=True,
        ):
            if not ignored:
                (scores[image].faults if found < 0 else scores[image].hits).append(index)
        seen = set(zip(counted.image.tolist(), counted.found.tolist(), strict=True))
        for image, target in enumerate(self.targets):
            crowd = target.crowd.tolist()
            scores[image].lost.extend(i for i in range(len(crowd)) if not crowd[i] and (image, i) not in seen)
        return scores
