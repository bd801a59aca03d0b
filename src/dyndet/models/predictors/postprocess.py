"""Scores and boxes of all levels to final detections: threshold, top-k, clip, class-wise NMS."""

from __future__ import annotations

from collections.abc import Sequence

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
    """

    def __init__(
        self,
        *,
        score_threshold: float = 0.05,
        topk: int = 1000,
        iou_threshold: float = 0.6,
        max_detections: int = 100,
    ) -> None:
        self.score_threshold = score_threshold
        self.topk = topk
        self.iou_threshold = iou_threshold
        self.max_detections = max_detections

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
            chosen, order = probabilities[index].flatten().topk(min(self.topk, probabilities[index].numel()))
            order = order[chosen > self.score_threshold]
            num_classes = probabilities.shape[-1]
            boxes.append(places[index][order // num_classes])
            scores.append(finals[index].flatten()[order])
            labels.append(order % num_classes)
        height, width = images.sizes[index].tolist()
        limit = levels[0][2].new_tensor([width, height, width, height])
        clipped = torch.minimum(torch.cat(boxes).clamp(min=0), limit)
        score, label = torch.cat(scores), torch.cat(labels)
        solid = ((clipped[:, 2:] - clipped[:, :2]) > 0).all(1)
        clipped, score, label = clipped[solid], score[solid], label[solid]
        keep = batched_nms(clipped, score, label, self.iou_threshold)[: self.max_detections]
        original_height, original_width = images.original_sizes[index].tolist()
        ratio = limit.new_tensor([original_width / width, original_height / height]).repeat(2)
        return Detections(clipped[keep] * ratio, score[keep], label[keep])
