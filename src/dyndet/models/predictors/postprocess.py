"""Scores and boxes of all levels to final detections: threshold, top-k, clip, class-wise NMS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from dyndet.structures import Detections, ImageBatch


class Postprocess:
    """Shared by the dense predictors.

    Args:
        score_threshold: candidates must exceed it (on the class probability, before centerness).
        topk: candidates per level.
        iou_threshold: boxes of one class that overlap a better one by more are dropped.
        max_detections: per image.
        rank: the `topk` of a level are the best by "probability" of the class, or by final "score" among those above
            the threshold.
        clip: "before" NMS boxes are cut to the image, or "after" it.
        candidates: pairs of location and class are candidates. "scores": a level has at most `topk` of them;
            "locations": nor has it more than locations (the authors of the fine-grained head, on coarse levels).
    """

    def __init__(
        self,
        *,
        score_threshold: float = 0.05,
        topk: int = 1000,
        iou_threshold: float = 0.6,
        max_detections: int = 100,
        rank: Literal["probability", "score"] = "probability",
        clip: Literal["before", "after"] = "before",
        candidates: Literal["scores", "locations"] = "scores",
    ) -> None:
        if rank not in ("probability", "score"):
            raise ValueError(f"rank must be 'probability' or 'score', got {rank!r}")
        if clip not in ("before", "after"):
            raise ValueError(f"clip must be 'before' or 'after', got {clip!r}")
        if candidates not in ("scores", "locations"):
            raise ValueError(f"candidates must be 'scores' or 'locations', got {candidates!r}")
        for key, value in (("topk", topk), ("max_detections", max_detections)):
            if value < 1:
                raise ValueError(f"{key} must be at least 1, got {value}")
        self.score_threshold = score_threshold
        self.topk = topk
        self.iou_threshold = iou_threshold
        self.max_detections = max_detections
        self.rank = rank
        self.clip = clip
        self.candidates = candidates

    def __call__(self, levels: Sequence[tuple[Tensor, Tensor, Tensor]], images: ImageBatch) -> list[Detections]:
        """Finishes a batch.

        Args:
            levels: per level the selection probabilities (B, P, K), the final scores (B, P, K) and the boxes
                (B, P, 4) xyxy in pixels of the padded input.
            images: for the valid and the original sizes.

        Returns:
            Per image, boxes clipped to it and mapped to the original pixels, best first.
        """
        return [self._image(levels, images, index) for index in range(len(images))]

    def _image(self, levels: Sequence[tuple[Tensor, Tensor, Tensor]], images: ImageBatch, index: int) -> Detections:
        boxes, scores, labels = [], [], []
        for probabilities, finals, places in levels:
            probability, final = probabilities[index].flatten(), finals[index].flatten()
            ranking = probability if self.rank == "probability" else final.where(probability > self.score_threshold, -1)
            most = len(ranking) if self.candidates == "scores" else len(places[index])
            order = ranking.topk(min(self.topk, most))[1]
            order = order[probability[order] > self.score_threshold]
            num_classes = probabilities.shape[-1]
            boxes.append(places[index][order // num_classes])
            scores.append(final[order])
            labels.append(order % num_classes)
        height, width = images.sizes[index].tolist()
        limit = levels[0][2].new_tensor([width, height, width, height])
        box, score, label = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
        if images.offsets is not None:
            box = box - images.offsets[index].flip(0).repeat(2).to(box)
        if self.clip == "before":
            box, score, label = _clip(box, score, label, limit)
        # batched_nms keeps classes apart by shifting them, which needs boxes that start at 0.
        keep = batched_nms(box - box.amin().clamp(max=0) if len(box) else box, score, label, self.iou_threshold)
        keep = keep[: self.max_detections]
        box, score, label = _clip(box[keep], score[keep], label[keep], limit)
        original_height, original_width = images.original_sizes[index].tolist()
        ratio = limit.new_tensor([original_width / width, original_height / height]).repeat(2)
        return Detections(box * ratio, score, label)


def _clip(boxes: Tensor, scores: Tensor, labels: Tensor, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes cut to the image; those outside it are dropped."""
    clipped = torch.minimum(boxes.clamp(min=0), limit)
    solid = ((clipped[:, 2:] - clipped[:, :2]) > 0).all(1)
    return clipped[solid], scores[solid], labels[solid]
