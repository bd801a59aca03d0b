"""Which detections are wanted, of those that a detector gives."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from types import UnionType

import torch
from torchvision.ops import nms

from dyndet.errors import UserError
from dyndet.structures import Category, Detections


class Wanted:
    """Takes detections by score, then by class, then one where several overlap, then the best.

    Args:
        categories: of the detector.
        score_threshold: the lowest score, in 0..1; None takes all.
        classes: their names; None takes all.
        agnostic_nms: boxes that overlap a better one by more (IoU), of whatever class, are left out; None keeps them.
        max_detections: of an image; None takes all.

    Raises:
        UserError: on a class that there is not, and on values out of range.
    """

    def __init__(
        self,
        categories: Sequence[Category],
        *,
        score_threshold: float | None = None,
        classes: Sequence[str] | None = None,
        agnostic_nms: float | None = None,
        max_detections: int | None = None,
    ) -> None:
        for key, value in (("score_threshold", score_threshold), ("agnostic_nms", agnostic_nms)):
            if value is not None and not (_is(value, int | float) and 0 <= value <= 1):
                raise UserError(f"{key}={value}: give a number from 0 to 1")
        if max_detections is not None and not (_is(max_detections, int) and max_detections >= 1):
            raise UserError(f"max_detections={max_detections}: give a whole number from 1")
        names = [category.name for category in categories]
        for name in classes or ():
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]}?" if near else f"it knows {', '.join(names[:20])}"
                raise UserError(f"classes={name}: this detector does not know that class; {hint}")
        self.score_threshold = score_threshold
        self.labels = None if classes is None else torch.tensor([names.index(name) for name in classes])
        self.agnostic_nms = agnostic_nms
        self.max_detections = max_detections

    def __call__(self, found: Detections) -> Detections:
        """Of one image, on the CPU."""
        if self.score_threshold is not None:
            found = found[found.scores >= self.score_threshold]
        if self.labels is not None:
            found = found[torch.isin(found.labels, self.labels)]
        if self.agnostic_nms is not None:
            found = found[nms(found.boxes, found.scores, self.agnostic_nms)]
        return found[torch.arange(min(len(found), self.max_detections or len(found)))]


def _is(value: object, kind: type | UnionType) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
