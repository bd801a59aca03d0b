"""Instance masks in the second stage (He et al., Mask R-CNN, ICCV 2017, arXiv:1703.06870).

The layers are torchvision's. Geometry follows detectron2: regions and masks are sampled at pixel centres, where
torchvision samples at corners when it crops, and rounds boxes outwards to whole pixels when it pastes.
Legend: K classes, N boxes of an image, R regions of all images, S x S pooled positions, M x M mask cells (M = 2 S).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import roi_align

from dyndet.errors import UserError
from dyndet.models.two_stage.roi import PyramidRoIAlign, RoIPredictor, RoISamples
from dyndet.structures import Detections, Size, Target


class MaskHead(nn.Module):
    """3x3 convolutions with ReLU, a transposed one that doubles the map, and a mask per class.

    Args:
        channels: C of the features.
        num_classes: K.
        hidden: width of the convolutions.
        num_convs: 3x3 convolutions before the transposed one.
    """

    def __init__(self, channels: int, *, num_classes: int, hidden: int = 256, num_convs: int = 4) -> None:
        super().__init__()
        self.layers = MaskRCNNHeads(channels, [hidden] * num_convs, dilation=1)
        self.masks = MaskRCNNPredictor(hidden if num_convs else channels, hidden, num_classes)
        logits = self.masks.get_submodule("mask_fcn_logits")
        nn.init.normal_(logits.get_parameter("weight"), std=0.001)  # undecided at first
        for layer in (self.masks.get_submodule("conv5_mask"), logits):
            nn.init.zeros_(layer.get_parameter("bias"))

    def forward(self, regions: Tensor) -> Tensor:
        """(R, C, S, S) -> (R, K, 2 S, 2 S) logits."""
        return self.masks(self.layers(regions))


class MaskRCNN(nn.Module):
    """Any second stage for boxes, and a mask for every box that it finds.

    Masks train on the regions that belong to a target, as the boxes' (first) stage sampled them.

    Args:
        channels: C of the features.
        strides: per level.
        box: called with `channels` and `strides`: `FastRCNN`, `CascadeRCNN`.
        head: called with `channels` and `num_classes`; maps (R, C, S, S) to (R, K, M, M) logits.
        size: S.
        max_stride: coarser levels are not read.
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        *,
        box: Callable[..., RoIPredictor],
        head: Callable[..., nn.Module] = MaskHead,
        size: int = 14,
        max_stride: int = 32,
    ) -> None:
        super().__init__()
        self.box = box(channels=channels, strides=strides)
        self.mask_pool = PyramidRoIAlign(strides, size=size, max_stride=max_stride)
        self.mask_head = head(channels=channels, num_classes=self.box.num_classes)
        self.num_classes = self.box.num_classes
        self.max_detections = self.box.max_detections
        self.size = self.box.size

    def forward(self, regions: Tensor) -> Any:
        """As the boxes' stage; `mask_head` takes regions of `mask_pool.size`."""
        return self.box(regions)

    def sample(self, proposals: Sequence[Tensor], targets: Sequence[Target]) -> RoISamples:
        """As the boxes' stage."""
        return self.box.sample(proposals, targets)

    def losses(
        self, features: Sequence[Tensor], samples: RoISamples, targets: Sequence[Target], sizes: Sequence[Size]
    ) -> dict[str, Tensor]:
        """The losses of the boxes, and `mask`: binary cross entropy of the own class, a mean over regions and cells.

        Args:
            features: L x (B, C, H, W).
            samples: from `sample`.
            targets: per image, without crowd, with masks.
            sizes: valid (H, W) of every image in pixels of the input.

        Raises:
            UserError: if a target has objects but no masks.
        """
        positive = [label > 0 for label in samples.labels]
        boxes = [part[keep] for part, keep in zip(samples.boxes, positive, strict=True)]
        labels = [part[keep] - 1 for part, keep in zip(samples.labels, positive, strict=True)]
        matched = [part[keep] for part, keep in zip(samples.matched, positive, strict=True)]
        logits = self._own_masks(features, boxes, labels)
        wanted = [
            crop_masks(_masks_of(target), part, index, logits.shape[-1])
            for target, part, index in zip(targets, boxes, matched, strict=True)
        ]
        cost = F.binary_cross_entropy_with_logits(logits, torch.cat(wanted).float(), reduction="sum")
        return self.box.losses(features, samples, targets, sizes) | {"mask": cost / max(logits.numel(), 1)}

    def detections(
        self, features: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[Size]
    ) -> list[Detections]:
        """As the boxes' stage, with masks (N, M, M) in 0..1 on a grid over each box; `paste_masks` takes them."""
        found = self.box.detections(features, proposals, sizes)
        logits = self._own_masks(features, [item.boxes for item in found], [item.labels for item in found])
        masks = logits.sigmoid().split([len(item) for item in found])
        return [replace(item, masks=part) for item, part in zip(found, masks, strict=True)]

    def _own_masks(self, features: Sequence[Tensor], boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        """(R, M, M) logits of each box for its own class, float32."""
        logits = self.mask_head(self.mask_pool(features, boxes))
        return logits[torch.arange(len(logits), device=logits.device), torch.cat(list(labels))].float()


def crop_masks(masks: Tensor, boxes: Tensor, index: Tensor, size: int) -> Tensor:
    """What a box sees of a mask: a cell is set where the mask covers at least half of it.

    Args:
        masks: (N, H, W) bool.
        boxes: (R, 4) xyxy in pixels of the masks.
        index: (R,) which mask each is for.
        size: M.

    Returns:
        (R, M, M) bool.
    """
    needed, index = index.unique(return_inverse=True)  # the others need not become floats
    regions = torch.cat([index[:, None].float(), boxes.float()], 1)
    covered = roi_align(masks[needed, None].float(), regions, size, sampling_ratio=0, aligned=True)
    return covered[:, 0] >= 0.5


def paste_masks(masks: Tensor, boxes: Tensor, size: Size, threshold: float = 0.5) -> Tensor:
    """Masks over boxes as pixels of an image: set where the mask, interpolated at the pixel's centre, is large enough.

    Args:
        masks: (N, M, M) in 0..1, on a grid over each box.
        boxes: (N, 4) xyxy in pixels of the image; they have an area.
        size: (H, W) of the image.
        threshold: the least value of a pixel that is set.

    Returns:
        (N, H, W) bool.
    """
    height, width = size
    pasted = torch.zeros(len(boxes), height, width, dtype=torch.bool, device=masks.device)
    for image, mask, (x1, y1, x2, y2) in zip(pasted, masks, boxes.tolist(), strict=True):
        # No other pixel has its centre in the box, so nothing larger than the box is interpolated.
        left, top = max(math.floor(x1), 0), max(math.floor(y1), 0)
        right, bottom = min(math.ceil(x2), width), min(math.ceil(y2), height)
        x = (torch.arange(left, right, device=mask.device) + 0.5 - x1) / (x2 - x1) * 2 - 1
        y = (torch.arange(top, bottom, device=mask.device) + 0.5 - y1) / (y2 - y1) * 2 - 1
        places = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).to(mask.dtype)
        values = F.grid_sample(mask[None, None], places[None], align_corners=False)
        image[top:bottom, left:right] = values[0, 0] >= threshold
    return pasted


def _masks_of(target: Target) -> Tensor:
    if target.masks is not None:
        return target.masks
    if len(target.labels):
        where = f"image {target.image_id} {target.path}".rstrip()
        raise UserError(f"{where} has no masks for this detector to learn: set data.masks=true, on data with masks")
    return torch.zeros(0, 1, 1, device=target.boxes.device)
