"""Which predictions of a YOLO answer for which objects: neighbouring cells and fitting anchors, then the cheapest ones.

Source: the assignment of YOLOv7 (Wang et al., CVPR 2023, arXiv:2207.02696), a variant of SimOTA (Ge et al., YOLOX,
arXiv:2107.08430).
Legend: B images, A anchors per position, K classes, N objects of the batch, G of an image, M matches or candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dyndet.ops.boxes import chunks_of, paired_iou
from dyndet.structures import Target

_STEPS = [(0, 0), (-1, 0), (0, -1), (1, 0), (0, 1)]  # columns and rows to the own cell, left, upper, right, lower
_EPS = 1e-7  # keeps the score off 0 and 1, whose logarithms are infinite


@dataclass(frozen=True)
class Objects:
    """All objects of a batch.

    Attributes:
        boxes: (N, 4) float32 xyxy in pixels.
        labels: (N,) int64.
        image: (N,) int64, the image each lies in.
    """

    boxes: Tensor
    labels: Tensor
    image: Tensor

    @classmethod
    def of(cls, targets: Sequence[Target], device: torch.device) -> Objects:
        counts = torch.tensor([len(target.labels) for target in targets], device=device)
        return cls(
            torch.cat([target.boxes for target in targets]).to(device).float(),
            torch.cat([target.labels for target in targets]).to(device),
            torch.arange(len(targets), device=device).repeat_interleave(counts),
        )

    @property
    def centre(self) -> Tensor:
        """(N, 2) x, y in pixels."""
        return (self.boxes[:, :2] + self.boxes[:, 2:]) / 2

    @property
    def size(self) -> Tensor:
        """(N, 2) width, height in pixels."""
        return self.boxes[:, 2:] - self.boxes[:, :2]


@dataclass(frozen=True)
class Matches:
    """Predictions of one level and the objects they answer for. It is a list: a prediction may be in it several times.

    Attributes:
        image: (M,) int64, like the others.
        anchor: of the position.
        row: of the map.
        column: of the map.
        owner: index of the object among those of the batch.
    """

    image: Tensor
    anchor: Tensor
    row: Tensor
    column: Tensor
    owner: Tensor

    @property
    def place(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Index into maps (B, A, H, W, ...)."""
        return self.image, self.anchor, self.row, self.column

    @property
    def cell(self) -> Tensor:
        """(M, 2) column, row."""
        return torch.stack([self.column, self.row], 1)

    def kept(self, keep: Tensor, owner: Tensor) -> Matches:
        """Those that `keep`, (M,) bool, marks, with other owners (M,)."""
        fields = {name: getattr(self, name)[keep] for name in ("image", "anchor", "row", "column")}
        return replace(self, **fields, owner=owner[keep])


def candidates(objects: Objects, anchors: Tensor, stride: int, extent: Tensor, ratio: float) -> Matches:
    """Every object with the anchors of its shape, in its cell and the one or two cells nearest to its centre.

    Args:
        objects: N of them.
        anchors: (A, 2) width, height in pixels.
        stride: of the level.
        extent: (B, 2) columns and rows of the map that belong to each image; the rest is padding.
        ratio: sides of box and anchor differ by less than this factor.
    """
    factor = objects.size / anchors[:, None]
    fits = torch.maximum(factor, 1 / factor).amax(-1) < ratio  # (A, N)
    centre, limit = objects.centre / stride, extent[objects.image]
    # On the edge of two cells (0) it is the lower neighbour: predictions of the upper one do not reach there.
    before = (centre.frac() < 0.5) & (centre > 1)
    after = (centre.frac() > 0.5) & (limit - centre > 1)
    near = torch.cat([torch.ones_like(before[:, :1]), before, after], 1).T  # (5, N)
    step, anchor, owner = (near[:, None] & fits).nonzero(as_tuple=True)
    cell = centre[owner].floor().long() + torch.tensor(_STEPS, device=step.device)[step]
    column, row = torch.minimum(cell, limit[owner] - 1).clamp(min=0).unbind(1)
    return Matches(objects.image[owner], anchor, row, column, owner)


@torch.no_grad()
def cheapest(
    proposed: Sequence[Matches], logits: Sequence[Tensor], boxes: Sequence[Tensor], objects: Objects, topk: int
) -> list[Matches]:
    """Of the candidates of all levels, those that objects of their image choose; see `choose`.

    Args:
        proposed: per level M_l candidates.
        logits: per level (M_l, 1 + K) objectness and classes at the candidates.
        boxes: per level (M_l, 4) xyxy in pixels that they predict.
        objects: of the batch.
        topk: see `choose`.
    """
    image = torch.cat([level.image for level in proposed])
    same = _first_alike(proposed)
    every_logit, every_box = torch.cat(list(logits)).float(), torch.cat(list(boxes)).float()
    owner = torch.full_like(image, -1)
    for index in objects.image.unique().tolist():
        here, mine = (image == index).nonzero()[:, 0], (objects.image == index).nonzero()[:, 0]
        first = torch.searchsorted(here, same[here])
        chosen = choose(every_logit[here], every_box[here], objects.boxes[mine], objects.labels[mine], topk, first)
        owner[here] = torch.where(chosen >= 0, mine[chosen], -1)
    parts = owner.split([len(level.image) for level in proposed])
    return [level.kept(part >= 0, part) for level, part in zip(proposed, parts, strict=True)]


def _first_alike(proposed: Sequence[Matches]) -> Tensor:
    """(M,) index of the first candidate of the same prediction."""
    key = torch.cat(
        [
            (((level.image * len(proposed) + number) * 64 + level.anchor) * 2**20 + level.row) * 2**20 + level.column
            for number, level in enumerate(proposed)
        ]
    )
    key, order = key.sort(stable=True)
    begins = torch.cat([torch.ones_like(key[:1], dtype=torch.bool), key[1:] != key[:-1]])
    place = torch.arange(len(key), device=key.device)
    first = order[torch.where(begins, place, 0).cummax(0).values]
    return torch.empty_like(order).scatter(0, order, first)


def choose(
    logits: Tensor, boxes: Tensor, wanted: Tensor, labels: Tensor, topk: int, first: Tensor | None = None
) -> Tensor:
    """Objects of one image take the candidates that fit them best already.

    A candidate costs an object BCE(sqrt(objectness * class), one-hot) summed over classes - 3 log(IoU + 1e-8). An
    object takes as many as its `topk` largest IoUs sum up to (truncated, at least one), whoever proposed them. One that
    several objects take stays with the one to which it is cheapest. Ties go to what comes first.

    Args:
        logits: (M, 1 + K) objectness and classes of the candidates.
        boxes: (M, 4) they predict, xyxy.
        wanted: (G, 4) boxes of the objects.
        labels: (G,) of the objects.
        topk: see above.
        first: (M,) int64, the first candidate of the same prediction; None where all are of different ones.

    Returns:
        (M,) int64 index of the object, -1 for none.
    """
    number = len(boxes)
    if not number:
        return labels.new_zeros(0)
    iou = torch.cat([paired_iou(part[:, None], boxes) for part in chunks_of(wanted, number)])  # (G, M)
    chance = logits.sigmoid()
    score = (chance[:, 1:] * chance[:, :1]).sqrt().clamp(_EPS, 1 - _EPS)
    absent = -torch.log1p(-score)
    cls = absent.sum(1) + (-score.log() - absent)[:, labels].T
    cost = cls - 3 * (iou + 1e-8).log()
    if first is not None:  # decoded twice, it may be rounded in two ways
        cost, iou = cost[:, first], iou[:, first]
    count = iou.topk(min(topk, number), 1)[0].sum(1).long().clamp(min=1)
    among = torch.arange(number, device=cost.device) < count[:, None]
    takes = torch.zeros_like(among).scatter(1, cost.argsort(dim=1, stable=True), among)
    owner = cost.masked_fill(~takes, torch.inf).argmin(0)
    return torch.where(takes.any(0), owner, -1)
