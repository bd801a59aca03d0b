"""Assignment by overlap (RetinaNet, Lin et al., arXiv:1708.02002; Faster R-CNN, Ren et al., arXiv:1506.01497)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from dyndet.models.predictors.anchors import AnchorTargets
from dyndet.ops.boxes import chunks_of
from dyndet.structures import Target


class IoUAssigner:
    """Positive above one overlap, background below another, in between ignored.

    Args:
        positive: least IoU with a box to belong to it.
        negative: below this IoU with every box an anchor is background.
        low_quality: each box also gets the anchors that overlap it most (all that tie), however little.
    """

    def __init__(self, *, positive: float = 0.5, negative: float = 0.4, low_quality: bool = True) -> None:
        if not 0 <= negative <= positive:
            raise ValueError(f"0 <= negative <= positive must hold, got {negative} and {positive}")
        self.positive = positive
        self.negative = negative
        self.low_quality = low_quality

    def __call__(
        self, anchors: Sequence[Tensor], target: Target, num_classes: int, valid: Tensor | None = None
    ) -> AnchorTargets:
        """Assigns one image. Ties between boxes go to the first, low-quality matches to the last.

        Args:
            anchors: per level (P_l, 4).
            target: boxes in the same pixels, without crowd.
            num_classes: the background label.
            valid: (P,) bool, anchors that may be chosen; None for all.
        """
        every = torch.cat(list(anchors))
        boxes = target.boxes.to(every)
        match = torch.zeros(len(every), dtype=torch.int64, device=every.device)
        best = every.new_zeros(len(every))
        start = 0
        for part in chunks_of(boxes, len(every)):
            overlap, index = _overlaps(part, every, valid).max(0)
            better = overlap > best
            best, match = torch.where(better, overlap, best), torch.where(better, index + start, match)
            start += len(part)
        labels = torch.full_like(match, -1)
        labels[best < self.negative] = num_classes
        taken = best >= self.positive
        if self.low_quality:
            start = 0
            for part in chunks_of(boxes, len(every)):
                overlap = _overlaps(part, every, valid)
                highest = overlap.amax(1, keepdim=True)
                wanted = (overlap == highest) & (highest > 0)
                order = torch.arange(start, start + len(part), device=every.device)[:, None]
                last = torch.where(wanted, order, -1).amax(0)
                match, taken = torch.where(last >= 0, last, match), taken | (last >= 0)
                start += len(part)
        if not len(boxes):
            return AnchorTargets(labels, torch.zeros_like(every))
        return AnchorTargets(torch.where(taken, target.labels[match], labels), boxes[match])


def _overlaps(boxes: Tensor, anchors: Tensor, valid: Tensor | None) -> Tensor:
    """(n, P), 0 where an anchor may not be chosen."""
    overlap = box_iou(boxes, anchors)
    return overlap if valid is None else overlap * valid
