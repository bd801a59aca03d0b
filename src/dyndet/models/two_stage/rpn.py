"""The region proposal network: boxes worth a second look (Faster R-CNN on an FPN).

Source: Ren et al., Faster R-CNN, NeurIPS 2015, arXiv:1506.01497; Lin et al., FPN, CVPR 2017, arXiv:1612.03144.

Matching, sampling and the selection of proposals are torchvision's. The conventions are detectron2's: exact anchors,
L1, and losses divided by the number of anchors that were asked for.
Legend: B images, A anchors per position, N anchors of all levels, P proposals of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from dyndet.models.detectors.base import RawMaps
from dyndet.models.predictors.anchors import AnchorGrid
from dyndet.models.predictors.maps import flat_levels
from dyndet.structures import Size, Target


class RPN(nn.Module):
    """One 3x3 convolution with ReLU, shared by all levels, then objectness and box deltas by 1x1 convolutions.

    Args:
        channels: C of the features.
        strides: per level.
        anchors: shapes; None takes sides of 8 strides (32 to 512 pixels on strides 4 to 64), ratios 0.5, 1 and 2, and
            centres at the corners of the cells.
        positive_iou: anchors that overlap a box at least so much are positive; so is the best anchor of every box.
        negative_iou: those that overlap every box less are negative. In between they do not train.
        samples: anchors per image that train.
        positive_fraction: at most this share of them is positive.
        beta: where smooth L1 turns from quadratic to linear; 0 is L1 (torchvision: 1/9).
        topk_train: candidates per level before NMS, in training.
        topk_test: likewise in eval mode.
        nms_iou: proposals of one level that overlap a better one by more are dropped.
        max_proposals: per image, after NMS.
        ignore_padding: anchors whose centre lies on padding neither train nor propose (detectron2 keeps them).
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        *,
        anchors: AnchorGrid | None = None,
        positive_iou: float = 0.7,
        negative_iou: float = 0.3,
        samples: int = 256,
        positive_fraction: float = 0.5,
        beta: float = 0.0,
        topk_train: int = 2000,
        topk_test: int = 1000,
        nms_iou: float = 0.7,
        max_proposals: int = 1000,
        ignore_padding: bool = True,
    ) -> None:
        super().__init__()
        self.strides = list(strides)
        self.anchors = anchors or AnchorGrid([8.0], [0.5, 1.0, 2.0])
        self.network = RegionProposalNetwork(
            # Idle: it rounds the anchors' sides, and its strides are wrong where a level does not divide the image.
            AnchorGenerator(),
            RPNHead(channels, self.anchors.per_position),
            fg_iou_thresh=positive_iou,
            bg_iou_thresh=negative_iou,
            batch_size_per_image=samples,
            positive_fraction=positive_fraction,
            pre_nms_top_n={"training": topk_train, "testing": topk_test},
            post_nms_top_n={"training": max_proposals, "testing": max_proposals},
            nms_thresh=nms_iou,
        )
        self.samples = samples
        self.beta = beta
        self.max_proposals = max_proposals
        self.ignore_padding = ignore_padding

    def forward(self, features: Sequence[Tensor]) -> RawMaps:
        """L x (B, C, H, W) -> per level `objectness` (B, A, H, W) logits and `deltas` (B, 4A, H, W)."""
        objectness, deltas = self.network.head(list(features))
        return [{"objectness": o, "deltas": d} for o, d in zip(objectness, deltas, strict=True)]

    def losses(
        self, raw: RawMaps, targets: Sequence[Target], valid: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Scalar losses `rpn_cls` (binary cross entropy) and `rpn_box` (smooth L1 of the deltas), in float32.

        Both are sums over the sampled anchors, divided by `samples` and the number of images.

        Args:
            raw: from `forward`.
            targets: per image, without crowd; boxes must have an area.
            valid: L x (B, 1, H, W) bool, False on padding.
        """
        anchors = torch.cat(self._anchors(raw))
        objectness, deltas = flat_levels(raw, "objectness", 1)[..., 0], flat_levels(raw, "deltas", 4)
        inside = self._inside(objectness, valid)
        losses = []
        for image, target in enumerate(targets):
            where = inside[image]
            places = anchors[where]
            [labels], [matched] = self.network.assign_targets_to_anchors([places], [{"boxes": target.boxes.float()}])
            [positive], [negative] = self.network.fg_bg_sampler([labels])
            positive, chosen = positive.bool(), (positive | negative).bool()
            wanted = self.network.box_coder.encode_single(matched[positive], places[positive])
            cls = F.binary_cross_entropy_with_logits(objectness[image, where][chosen], labels[chosen], reduction="sum")
            box = F.smooth_l1_loss(deltas[image, where][positive], wanted, beta=self.beta, reduction="sum")
            losses.append(torch.stack([cls, box]))
        cls, box = torch.stack(losses).sum(0) / (self.samples * len(targets))
        return {"rpn_cls": cls, "rpn_box": box}

    @torch.no_grad()
    def proposals(self, raw: RawMaps, sizes: Sequence[Size], valid: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The best boxes of every image, clipped to it, without gradient.

        Args:
            raw: from `forward`.
            sizes: valid (H, W) of every image in pixels of the input.
            valid: L x (B, 1, H, W) bool, False on padding.

        Returns:
            Per image (P, 4) xyxy in pixels of the input, best first; how many levels' candidates compete follows the
            mode (`topk_train`, `topk_test`).
        """
        levels = self._anchors(raw)
        objectness, deltas = flat_levels(raw, "objectness", 1)[..., 0], flat_levels(raw, "deltas", 4)
        boxes = self.network.box_coder.decode(deltas.flatten(0, 1), [torch.cat(levels)] * len(objectness))
        outside = ~self._inside(objectness, valid)
        # Last in rank, and too small to be kept.
        objectness = objectness.masked_fill(outside, -torch.inf)
        boxes = boxes.view(*objectness.shape, 4).masked_fill(outside[..., None], 0.0)
        found, _ = self.network.filter_proposals(boxes, objectness, list(sizes), [len(level) for level in levels])
        return found

    def _anchors(self, raw: RawMaps) -> list[Tensor]:
        """Per level (H*W*A, 4)."""
        maps = [level["objectness"] for level in raw]
        return [
            self.anchors((x.shape[-2], x.shape[-1]), stride, x.device)
            for x, stride in zip(maps, self.strides, strict=True)
        ]

    def _inside(self, objectness: Tensor, valid: Sequence[Tensor] | None) -> Tensor:
        """(B, N) bool: anchors that count."""
        if valid is None or not self.ignore_padding:
            return torch.ones_like(objectness, dtype=torch.bool)
        return torch.cat([mask.flatten(1) for mask in valid], 1).repeat_interleave(self.anchors.per_position, 1)
