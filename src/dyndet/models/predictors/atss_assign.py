"""Adaptive training sample selection (Zhang et al., ATSS, CVPR 2020, arXiv:1912.02424, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dyndet.models.predictors.anchors import AnchorTargets
from dyndet.ops.boxes import chunks_of, paired_iou
from dyndet.structures import Target


class AdaptiveAssigner:
    """Positives are, among the nearest anchors of a box, those that overlap it more than the rest do.

    Args:
        topk: nearest anchors per box and level (9; with several anchors per position the authors take as many times
            more).
    """

    def __init__(self, *, topk: int = 9) -> None:
        if topk < 1:
            raise ValueError(f"topk must be at least 1, got {topk}")
        self.topk = topk

    def __call__(
        self, anchors: Sequence[Tensor], target: Target, num_classes: int, valid: Tensor | None = None
    ) -> AnchorTargets:
        """Assigns one image; ties go to the box that comes first.

        Args:
            anchors: per level (P_l, 4).
            target: boxes in the same pixels, without crowd.
            num_classes: the background label.
            valid: (P,) bool, anchors that may be chosen; None for all.
        """
        every = torch.cat(list(anchors))
        boxes = target.boxes.to(every)
        labels = torch.full((len(every),), num_classes, dtype=torch.int64, device=every.device)
        if not len(boxes):
            return AnchorTargets(labels, torch.zeros_like(every))
        chosen = self._nearest(anchors, boxes, valid)  # (N, M)
        near = every[chosen]
        iou = paired_iou(near, boxes[:, None])
        exists = torch.ones_like(chosen, dtype=torch.bool) if valid is None else valid[chosen]
        count = exists.sum(1, keepdim=True).clamp(min=1)
        mean = (iou * exists).sum(1, keepdim=True) / count
        spread = (((iou - mean) * exists).square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        centre = (near[..., :2] + near[..., 2:]) / 2
        inside = torch.cat([centre - boxes[:, None, :2], boxes[:, None, 2:] - centre], -1).amin(-1) > 0.01
        positive = exists & inside & (iou >= mean + spread)

        # An anchor that several boxes want goes to the one it overlaps most.
        where, overlap = chosen[positive], iou[positive]
        owner = torch.arange(len(boxes), device=every.device)[:, None].expand_as(chosen)[positive]
        best = every.new_full((len(every),), -1).scatter_reduce(0, where, overlap, "amax")
        first = owner.masked_fill(overlap < best[where], len(boxes))
        match = torch.full_like(labels, len(boxes)).scatter_reduce(0, where, first, "amin")
        taken = match < len(boxes)
        match = match.clamp(max=len(boxes) - 1)
        return AnchorTargets(torch.where(taken, target.labels[match], labels), boxes[match])

    def _nearest(self, anchors: Sequence[Tensor], boxes: Tensor, valid: Tensor | None) -> Tensor:
        """(N, M) indices of the candidates of every box, levels one after another."""
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        found, start = [], 0
        for level in anchors:
            points = (level[:, :2] + level[:, 2:]) / 2
            closed = None if valid is None else ~valid[start : start + len(level)]
            rows = []
            for part in chunks_of(centres, len(level)):
                distance = (points - part[:, None]).square().sum(-1).sqrt()
                if closed is not None:
                    distance = distance.masked_fill(closed, torch.inf)
                rows.append(distance.topk(min(self.topk, len(level)), 1, largest=False)[1])
            found.append(torch.cat(rows) + start)
            start += len(level)
        return torch.cat(found, 1)
