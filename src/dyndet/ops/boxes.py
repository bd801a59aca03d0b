"""Box arithmetic that torchvision does not have. Boxes are xyxy in pixels, no +1."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def boxes_from_ltrb(points: Tensor, ltrb: Tensor) -> Tensor:
    """(..., 2) points and (..., 4) distances to left, top, right, bottom -> (..., 4) boxes."""
    return torch.cat([points - ltrb[..., :2], points + ltrb[..., 2:]], -1)


def centerness_from_ltrb(ltrb: Tensor) -> Tensor:
    """(N, 4) distances -> (N,) sqrt(min(l, r)/max(l, r) * min(t, b)/max(t, b)) (FCOS, Eq. 3)."""
    across, along = ltrb[:, [0, 2]], ltrb[:, [1, 3]]
    ratio = (across.amin(1) / across.amax(1)) * (along.amin(1) / along.amax(1))
    return ratio.clamp(min=0).sqrt()


def iou_log_loss(predicted: Tensor, target: Tensor, eps: float = 1e-6) -> Tensor:
    """(N, 4) and (N, 4) matched boxes -> (N,) -log(IoU), bounded (UnitBox, arXiv:1608.01471; plain FCOS)."""
    corner = torch.minimum(predicted[:, 2:], target[:, 2:]) - torch.maximum(predicted[:, :2], target[:, :2])
    overlap = corner.clamp(min=0).prod(1)
    areas = (predicted[:, 2:] - predicted[:, :2]).prod(1) + (target[:, 2:] - target[:, :2]).prod(1)
    iou = overlap / (areas - overlap).clamp(min=eps)
    return -iou.clamp(min=eps).log()


def paired_iou(first: Tensor, second: Tensor) -> Tensor:
    """(..., 4) boxes that broadcast -> (...) IoU of each pair; 0 where neither has an area."""
    corner = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])
    overlap = corner.clamp(min=0).prod(-1)
    union = (first[..., 2:] - first[..., :2]).prod(-1) + (second[..., 2:] - second[..., :2]).prod(-1) - overlap
    return torch.where(union > 0, overlap / union, 0.0)


def chunks_of(boxes: Tensor, partners: int, limit: int = 4_000_000) -> Iterator[Tensor]:
    """Rows of `boxes` in chunks, so that a chunk x `partners` matrix stays below `limit` entries."""
    return iter(boxes.split(max(1, limit // max(partners, 1)))) if len(boxes) else iter(())
