"""The losses of one level of a YOLO (YOLOv7, arXiv:2207.02696), and how its numbers become boxes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dyndet.models.predictors.yolo_assign import Matches, Objects


def decode_place(logits: Tensor, cell: Tensor, anchor: Tensor, stride: float) -> tuple[Tensor, Tensor]:
    """Boxes as centre and size.

    Args:
        logits: (..., 4) x, y, w, h before the sigmoid.
        cell: (..., 2) column, row.
        anchor: (..., 2) width, height in pixels.
        stride: pixels per cell.

    Returns:
        (..., 2) centre: 2 sigmoid - 0.5 cells from the cell's corner, and (..., 2) size: (2 sigmoid)^2 anchors; pixels.
    """
    share = 2 * logits.sigmoid()
    return (share[..., :2] - 0.5 + cell) * stride, share[..., 2:].square() * anchor


def complete_iou(centre: Tensor, size: Tensor, wanted_centre: Tensor, wanted_size: Tensor, eps: float = 1e-7) -> Tensor:
    """(..., 2) centres and sizes, matched -> (...) CIoU (Zheng et al., AAAI 2020, arXiv:1911.08287).

    It is at most 1, and below 0 when far apart.

    `eps` is added to heights, union, squared diagonal and what divides, as published; the weight of the aspect ratio
    gets no gradient.
    """
    corner = torch.minimum(centre + size / 2, wanted_centre + wanted_size / 2)
    corner = corner - torch.maximum(centre - size / 2, wanted_centre - wanted_size / 2)
    hull = torch.maximum(centre + size / 2, wanted_centre + wanted_size / 2)
    hull = hull - torch.minimum(centre - size / 2, wanted_centre - wanted_size / 2)
    (width, height), (wanted_width, wanted_height) = size.unbind(-1), wanted_size.unbind(-1)
    height, wanted_height = height + eps, wanted_height + eps
    overlap = corner.clamp(min=0).prod(-1)
    iou = overlap / (width * height + wanted_width * wanted_height - overlap + eps)
    away = (centre - wanted_centre).square().sum(-1) / (hull.square().sum(-1) + eps)
    angle = torch.atan(wanted_width / (wanted_height + eps)) - torch.atan(width / (height + eps))
    shape = 4 / math.pi**2 * angle.square()
    with torch.no_grad():
        weight = shape / ((1 - iou).clamp(min=0) + shape + eps)  # rounding may lift an IoU above 1
    return iou - away - weight * shape


def level_losses(
    pred: Tensor, matches: Matches, objects: Objects, anchors: Tensor, stride: int, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Box, objectness and class loss of one level: means of 1 - CIoU over matches, of BCE over places, over matches.

    Objectness should be max(CIoU, 0) at matches and 0 elsewhere. With a single class the last one is 0.

    Args:
        pred: (B, A, H, W, 5 + K) x, y, w, h, objectness, classes before the sigmoid.
        matches: places that answer for objects.
        objects: of the batch.
        anchors: (A, 2) width, height in pixels.
        stride: of the level.
        valid: (B, 1, H, W) bool, False on padding, which is left out; None counts every place.
    """
    rows = pred[matches.place].float()
    number = max(len(rows), 1)
    # In strides, relative to the cell.
    centre, size = decode_place(rows[:, :4], torch.zeros_like(rows[:, :2]), anchors[matches.anchor] / stride, 1.0)
    wanted_centre = objects.centre[matches.owner] / stride - matches.cell
    ciou = complete_iou(centre, size, wanted_centre, objects.size[matches.owner] / stride)
    box = (1 - ciou).sum() / number

    quality = torch.zeros(pred.shape[:-1], device=pred.device)
    last = _last_of_each(matches, quality.shape)
    quality[tuple(index[last] for index in matches.place)] = ciou.detach()[last].clamp(min=0)
    counts = ... if valid is None else valid.expand_as(quality)
    obj = F.binary_cross_entropy_with_logits(pred[..., 4][counts].float(), quality[counts])

    classes = rows[:, 5:]
    if classes.shape[1] == 1:
        return box, obj, classes.sum() * 0
    wanted = F.one_hot(objects.labels[matches.owner], classes.shape[1]).float()
    return box, obj, F.binary_cross_entropy_with_logits(classes, wanted, reduction="sum") / (number * classes.shape[1])


def _last_of_each(matches: Matches, shape: torch.Size) -> Tensor:
    """(M,) bool: no later match has the same place. Writing to one place twice would leave the winner to chance."""
    _, anchors, height, width = shape
    place = ((matches.image * anchors + matches.anchor) * height + matches.row) * width + matches.column
    group = place.unique(return_inverse=True)[1]
    order = torch.arange(len(group), device=group.device)
    return torch.zeros_like(group).scatter_reduce(0, group, order, "amax")[group] == order
