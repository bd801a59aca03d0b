"""The anchor-based YOLO predictor: boxes, objectness and classes from one 1x1 convolution per level.

Source: Wang et al., YOLOv7, CVPR 2023, arXiv:2207.02696; the detection losses of DynamicDet (Lin et al., CVPR 2023,
arXiv:2304.05552).
Legend: B images, L levels, A anchors per position, K classes, N objects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from dyndet.models.detectors.base import Branch, RawMaps
from dyndet.models.predictors.implicit import ImplicitConv
from dyndet.models.predictors.maps import check_labels, level_shares
from dyndet.models.predictors.postprocess import Postprocess
from dyndet.models.predictors.yolo_assign import Matches, Objects, candidates, cheapest
from dyndet.models.predictors.yolo_loss import decode_place, level_losses
from dyndet.ops.distributed import world_size
from dyndet.structures import Detections, HeadOutput, ImageBatch, Target

_BALANCE = {3: (4.0, 1.0, 0.4), 4: (4.0, 1.0, 0.25, 0.06)}


class YoloPredictor(nn.Module):
    """Reads one map per level (`HeadOutput.cls`); every level has a convolution and anchors of its own.

    Args:
        channels: of every level, or one number for all.
        strides: per level.
        num_classes: K.
        anchors: per level A pairs of width and height, in pixels; kept in the state dict.
        implicit: learned vectors around the last convolutions, see `ImplicitConv`; False leaves them out.
        image_size: side of the images in pixels; objectness weighs more on larger ones, whose places are more.
        box_gain: weight of the box loss with three levels; its share per level stays when there are more.
        obj_gain: of objectness, likewise, at 640 pixels.
        cls_gain: of classification, likewise, with 80 classes.
        balance: weight of every level in the objectness loss; None takes the published ones for 3 or 4 levels.
        times_batch: losses are multiplied by the number of images in the batch, of all processes, as published. Where
            batches accumulate, the trainer divides by their number: set this to the images of an optimizer step.
        assignment: "ota": objects choose among the candidates, see `yolo_assign.choose`; "candidates": every candidate
            is positive.
        anchor_ratio: an anchor is a candidate when its sides differ from the box's by less than this factor.
        topk: IoUs that decide how many candidates an object chooses.
        postprocess: threshold and NMS; `topk` counts for all levels together. None takes 0.001, 30000, 0.65, 300.
        ignore_padding: leave places on padding out of losses and detections.

    Raises:
        ValueError: when channels, anchors or balance do not fit the strides.
    """

    reads: tuple[Branch, ...] = ("cls",)
    anchors: Tensor

    def __init__(
        self,
        channels: int | Sequence[int],
        strides: Sequence[int],
        *,
        num_classes: int,
        anchors: Sequence[Sequence[Sequence[float]]],
        implicit: bool = True,
        image_size: int = 640,
        box_gain: float = 0.05,
        obj_gain: float = 0.7,
        cls_gain: float = 0.3,
        balance: Sequence[float] | None = None,
        times_batch: bool | int = True,
        assignment: Literal["ota", "candidates"] = "ota",
        anchor_ratio: float = 4.0,
        topk: int = 10,
        postprocess: Postprocess | None = None,
        ignore_padding: bool = True,
    ) -> None:
        super().__init__()
        levels = len(strides)
        widths = [channels] * levels if isinstance(channels, int) else list(channels)
        if assignment not in ("ota", "candidates"):
            raise ValueError(f"assignment must be 'ota' or 'candidates', got {assignment!r}")
        if balance is None and levels not in _BALANCE:
            raise ValueError(f"no balance is published for {levels} levels: give `balance`, a number for each")
        balance = _BALANCE[levels] if balance is None else balance
        for name, value in (("channels", widths), ("anchors", anchors), ("balance", balance)):
            if len(value) != levels:
                raise ValueError(f"{name} are given for {len(value)} levels, but strides for {levels}: {list(strides)}")
        if len({len(level) for level in anchors}) != 1 or any(len(pair) != 2 for level in anchors for pair in level):
            raise ValueError("anchors must be as many pairs of width and height on every level")
        self.register_buffer("anchors", torch.tensor([[list(pair) for pair in level] for level in anchors]).float())
        self.strides = list(strides)
        self.num_classes = num_classes
        self.gains = {
            "box": box_gain * 3 / levels,
            "obj": obj_gain * 3 / levels * (image_size / 640) ** 2,
            "cls": cls_gain * 3 / levels * num_classes / 80,
        }
        self.balance = list(balance)
        self.times_batch = times_batch
        self.assignment = assignment
        self.anchor_ratio = anchor_ratio
        self.topk = topk
        self.postprocess = postprocess or Postprocess(
            score_threshold=0.001, topk=30_000, iou_threshold=0.65, max_detections=300, clip="after"
        )
        self.ignore_padding = ignore_padding
        outputs = self.anchors.shape[1] * (5 + num_classes)
        self.convs = nn.ModuleList(
            ImplicitConv(width, outputs) if implicit else nn.Conv2d(width, outputs, 1) for width in widths
        )
        for conv, stride in zip(self.convs, strides, strict=True):
            _start_rare(conv.conv if isinstance(conv, ImplicitConv) else conv, stride, num_classes)

    def forward(self, head: HeadOutput) -> RawMaps:
        """Per level `pred` (B, A, H, W, 5 + K): x, y, w, h, objectness, classes, all before the sigmoid."""
        return [
            {"pred": conv(x).unflatten(1, (self.anchors.shape[1], -1)).permute(0, 1, 3, 4, 2)}
            for conv, x in zip(self.convs, head.cls, strict=True)
        ]

    def losses(
        self, raw: RawMaps, targets: Sequence[Target], valid: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Scalar losses `box` (CIoU), `obj` and `cls`, in float32; their means are over the whole batch.

        Args:
            raw: from `forward`.
            targets: per image, without crowd.
            valid: L x (B, 1, H, W) bool, False on padding; valid places are a rectangle at the top left.

        Raises:
            ValueError: if a label is not in 0..K-1.
        """
        check_labels(targets, self.num_classes)
        masks = self._masks(raw, valid)
        objects = Objects.of(targets, raw[0]["pred"].device)
        matches = self.assign(raw, objects, masks)
        each = [
            level_losses(level["pred"], found, objects, anchors, stride, mask)
            for level, found, anchors, stride, mask in zip(
                raw, matches, self._anchors(), self.strides, masks, strict=True
            )
        ]
        box, obj, cls = (torch.stack(terms) for terms in zip(*each, strict=True))
        sums = {"box": box.sum(), "obj": (obj * obj.new_tensor(self.balance)).sum(), "cls": cls.sum()}
        times = self.times_batch or 1
        if times is True:
            times = len(targets) * world_size()  # several processes average their gradients
        return {name: value * self.gains[name] * times for name, value in sums.items()}

    @torch.no_grad()
    def assign(self, raw: RawMaps, objects: Objects, masks: Sequence[Tensor | None]) -> list[Matches]:
        """Per level, the places that answer for objects.

        Args:
            raw: from `forward`.
            objects: of the batch.
            masks: per level (B, 1, H, W) bool, False on padding, or None.
        """
        proposed, logits, boxes = [], [], []
        for level, anchors, stride, mask in zip(raw, self._anchors(), self.strides, masks, strict=True):
            found = candidates(objects, anchors, stride, _extent(level["pred"], mask), self.anchor_ratio)
            rows = level["pred"][found.place].float()
            centre, size = decode_place(rows[:, :4], found.cell, anchors[found.anchor], stride)
            proposed.append(found)
            logits.append(rows[:, 4:])
            boxes.append(torch.cat([centre - size / 2, centre + size / 2], 1))
        return proposed if self.assignment == "candidates" else cheapest(proposed, logits, boxes, objects, self.topk)

    @torch.no_grad()
    def positive_shares(self, raw: RawMaps, targets: Sequence[Target], valid: Sequence[Tensor] | None = None) -> Tensor:
        """The (L,) share of every level's positions that answer for an object; arguments as of `losses`."""
        check_labels(targets, self.num_classes)
        matches = self.assign(raw, Objects.of(targets, raw[0]["pred"].device), self._masks(raw, valid))
        positive = []
        for level, found in zip(raw, matches, strict=True):
            answers = torch.zeros_like(level["pred"][:, 0, ..., 0], dtype=torch.bool)  # (B, H, W)
            answers[found.image, found.row, found.column] = True
            positive.append(answers.flatten(1))
        return level_shares(positive, valid if self.ignore_padding else None)

    def decode(self, raw: RawMaps) -> Tensor:
        """(B, P, 5 + K) float32: x, y, w, h in pixels, objectness, classes, of all levels; rows run A, H, W."""
        rows = []
        for level, anchors, stride in zip(raw, self._anchors(), self.strides, strict=True):
            pred = level["pred"].float()
            height, width = pred.shape[2:4]
            row, column = torch.meshgrid(
                torch.arange(height, device=pred.device), torch.arange(width, device=pred.device), indexing="ij"
            )
            cell = torch.stack([column, row], -1)
            centre, size = decode_place(pred[..., :4], cell, anchors[:, None, None], stride)
            rows.append(torch.cat([centre, size, pred[..., 4:].sigmoid()], -1).flatten(1, 3))
        return torch.cat(rows, 1)

    def detections(self, raw: RawMaps, images: ImageBatch, valid: Sequence[Tensor] | None = None) -> list[Detections]:
        """Detections per image, in pixels of the original images; one place may be several classes.

        Args:
            raw: from `forward`.
            images: for the valid and the original sizes.
            valid: L x (B, 1, H, W) bool, False on padding.
        """
        rows = self.decode(raw)
        scores = rows[..., 4:5] if self.num_classes == 1 else rows[..., 4:5] * rows[..., 5:]
        if valid is not None and self.ignore_padding:
            numbers = self.anchors.shape[1]
            scores = scores * torch.cat([mask.flatten(1).repeat(1, numbers) for mask in valid], 1)[..., None]
        # As one level, so that the limit on candidates counts for all of them.
        return self.postprocess([(scores, scores, box_convert(rows[..., :4], "cxcywh", "xyxy"))], images)

    def _anchors(self) -> Tensor:
        """(L, A, 2) float32."""
        return self.anchors.float()

    def _masks(self, raw: RawMaps, valid: Sequence[Tensor] | None) -> Sequence[Tensor | None]:
        return [None] * len(raw) if valid is None or not self.ignore_padding else valid


def _extent(pred: Tensor, mask: Tensor | None) -> Tensor:
    """(B, 2) int64 columns and rows of a level that are no padding."""
    if mask is None:
        return torch.tensor([pred.shape[3], pred.shape[2]], device=pred.device).expand(len(pred), 2)
    return torch.cat([mask.any(2).sum(-1), mask.any(3).sum(-1)], 1)


@torch.no_grad()
def _start_rare(conv: nn.Module, stride: int, num_classes: int) -> None:
    """Biases start at eight objects per image of 640 pixels, and classes at 0.6 in K (added to the default start)."""
    assert isinstance(conv, nn.Conv2d) and conv.bias is not None
    bias = conv.bias.view(-1, 5 + num_classes)
    bias[:, 4] += math.log(8 / (640 / stride) ** 2)
    bias[:, 5:] += math.log(0.6 / (num_classes - 0.99))
