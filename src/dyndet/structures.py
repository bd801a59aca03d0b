"""The values that flow through dyndet: samples, batches, detections, routing, losses.

Shape legend: B images, C channels, H x W map, L levels, N boxes, K classes.
Geometry: pixel edges are 0..W (no +1); boxes are xyxy in pixels; labels are contiguous 0..K-1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]
"""Height, width in pixels."""


@dataclass(frozen=True, slots=True)
class Category:
    """A class of the dataset: its original id (gaps allowed, comes back out unchanged) and its name."""

    id: int
    name: str


@dataclass
class Target:
    """Ground truth of one image.

    Attributes:
        boxes: (N, 4) float32, xyxy in pixels of the image it belongs to.
        labels: (N,) int64 in 0..K-1.
        crowd: (N,) bool; crowd regions never train, and evaluation ignores matches with them.
        masks: (N, H, W) bool, or None when the dataset has none or they were not asked for.
        area: (N,) annotated areas in square pixels on disk (COCO: of the mask), or None to take those of the boxes.
        image_id: id in the original annotations.
        original_size: (H, W) of the image on disk, before any transform.
        path: the file it came from, "" when generated.
        difficulty: 0 (easy) .. 1 (hard) where the dataset knows it.
        segmentations: N polygons or run lengths of the masks on disk, as annotated, where the dataset has them:
            evaluation reads these, because transforms resize `masks`.
    """

    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    masks: Tensor | None = None
    area: Tensor | None = None
    image_id: int = 0
    original_size: Size = (0, 0)
    path: str = ""
    difficulty: float | None = None
    segmentations: list[Any] | None = None

    @classmethod
    def of(cls, value: Target | dict[str, Tensor]) -> Target:
        """Accepts a torchvision-style dict (`boxes`, `labels`, optional `crowd`, `masks`) as well as a Target."""
        if isinstance(value, Target):
            return value
        labels = value["labels"]
        crowd = value.get("crowd", torch.zeros_like(labels, dtype=torch.bool))
        return cls(value["boxes"].float(), labels.long(), crowd.bool(), value.get("masks"))

    def shifted(self, offset: Tensor) -> Target:
        """The same objects in pixels of a canvas on which the image begins at this (row, column)."""
        move = offset.flip(0).repeat(2).to(self.boxes)
        return replace(self, boxes=self.boxes + move)

    def to(self, device: torch.device | str) -> Target:
        tensors = ("boxes", "labels", "crowd", "masks", "area")
        moved = {name: getattr(self, name).to(device) for name in tensors if getattr(self, name) is not None}
        return replace(self, **moved)

    def without_crowd(self) -> Target:
        """The same target with only the boxes that train."""
        if not self.crowd.any():
            return self
        return self[~self.crowd]

    def __getitem__(self, keep: Tensor) -> Target:
        """The same target with only some of its objects: (N,) bool or indices."""
        tensors = ("boxes", "labels", "crowd", "masks", "area")
        kept = {name: getattr(self, name)[keep] for name in tensors if getattr(self, name) is not None}
        return replace(self, **kept, segmentations=None)  # evaluation reads whole targets


@dataclass
class Sample:
    """One image, uint8 (3, H, W) RGB, with its ground truth. Every dataset yields this."""

    image: Tensor
    target: Target


@dataclass
class ImageBatch:
    """Images padded at the bottom and right to one size.

    Attributes:
        pixels: (B, 3, H, W) RGB; uint8 0..255 or float 0..1 (the torchvision convention).
        sizes: (B, 2) int64, the valid H, W of each image inside `pixels`.
        original_sizes: (B, 2) int64, H, W on disk: detections are returned in these pixels.
        offsets: (B, 2) int64, the row and column inside `pixels` where each image begins; None: all at 0, 0.

    The sizes stay on the CPU: they steer Python code, and reading them from a GPU would wait for it.
    """

    pixels: Tensor
    sizes: Tensor
    original_sizes: Tensor
    offsets: Tensor | None = None

    @classmethod
    def of(cls, images: ImageBatch | Tensor | Sequence[Tensor], divisor: int = 1) -> ImageBatch:
        """From a (B, 3, H, W) tensor, or from (3, H, W) tensors that are padded to a multiple of `divisor`.

        Raises:
            ValueError: if the tensors are not three-channel images.
        """
        if isinstance(images, ImageBatch):
            return images
        if isinstance(images, Tensor):
            if images.ndim != 4 or images.shape[1] != 3:
                raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
            sizes = torch.tensor([images.shape[-2:]] * len(images), dtype=torch.int64)
            return cls(images, sizes, sizes)
        for image in images:
            if image.ndim != 3 or image.shape[0] != 3:
                raise ValueError(f"each image must be (3, H, W), got {tuple(image.shape)}")
        sizes = torch.tensor([image.shape[-2:] for image in images], dtype=torch.int64)
        height, width = (-(-int(side) // divisor) * divisor for side in sizes.amax(0))
        pixels = images[0].new_zeros(len(images), 3, height, width)
        for slot, image in zip(pixels, images, strict=True):
            slot[:, : image.shape[1], : image.shape[2]] = image
        return cls(pixels, sizes, sizes)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: Tensor) -> ImageBatch:
        """Some of the images: (N,) int64 on the CPU."""
        offsets = None if self.offsets is None else self.offsets[index]
        pixels = self.pixels[index.to(self.pixels.device)]
        return ImageBatch(pixels, self.sizes[index], self.original_sizes[index], offsets)

    def to(self, device: torch.device | str) -> ImageBatch:
        return replace(self, pixels=self.pixels.to(device, non_blocking=True))


@dataclass
class Batch:
    """What a data loader yields: padded images and one target per image (boxes in `images.pixels` pixels)."""

    images: ImageBatch
    targets: list[Target]

    def pin_memory(self) -> Batch:
        """Page-locked pixels, so that the copy to a GPU does not wait; called by data loaders."""
        return Batch(replace(self.images, pixels=self.images.pixels.pin_memory()), self.targets)

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.images.to(device), [target.to(device) for target in self.targets])


@dataclass
class Detections:
    """What was found in one image, in pixels of the original image, by descending score.

    Attributes:
        boxes: (N, 4) xyxy.
        scores: (N,) in 0..1.
        labels: (N,) int64 in 0..K-1.
        masks: (N, H, W) bool or None.
        macs: multiply-adds spent on this image, where they were metered.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None
    macs: float | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def to(self, device: torch.device | str) -> Detections:
        masks = None if self.masks is None else self.masks.to(device)
        return replace(
            self, boxes=self.boxes.to(device), scores=self.scores.to(device), labels=self.labels.to(device), masks=masks
        )


@dataclass(frozen=True, slots=True)
class ConvCost:
    """One layer of a gated path.

    Attributes:
        macs: multiply-adds per executed position.
        reach: radius of the receptive field from this layer's output to the path's output; the layer runs wherever an
            open gate lies within that many pixels (the set Omega of Eq. 4, Song et al. 2020).
    """

    macs: float
    reach: int = 0


@dataclass(frozen=True)
class PathGate:
    """What one gate decided at one level: the unit of routing.

    Attributes:
        node: which node of which branch, e.g. "cls.0".
        path: "up", "depth" or "down".
        level: index into the pyramid, finest first.
        gate: (B, 1, H, W) in [0, 1); 0 means not executed.
        costs: the layers of the path.
        router_macs: multiply-adds per position of taking the decision itself; spent whatever is decided.
        valid: (B, 1, H, W) bool, False on padding; None when every position counts.
        sparse: False where closed positions are computed all the same and then multiplied by 0: they count as used.
    """

    node: str
    path: str
    level: int
    gate: Tensor
    costs: tuple[ConvCost, ...]
    router_macs: float = 0.0
    valid: Tensor | None = None
    sparse: bool = True

    def mask(self, reach: int = 0) -> Tensor:
        """(B, 1, H, W) bool: the positions at which a layer of this reach runs."""
        return _dilate(self.gate, reach, self.valid) > 0

    def positions(self) -> Tensor:
        """(B,) number of positions that count."""
        if self.valid is None:
            return torch.full((len(self.gate),), self.gate[0].numel(), device=self.gate.device)
        return self.valid.sum((1, 2, 3))

    def density(self) -> Tensor:
        """(B,) share of valid positions whose gate is open."""
        return (self.gate > 0).sum((1, 2, 3)) / self.positions().clamp(min=1)


def _wide(counts: Tensor) -> Tensor:
    """Float64, which Apple's GPUs do not have: float32 there."""
    return counts.float() if counts.device.type == "mps" else counts.double()


def _dilate(gate: Tensor, reach: int, valid: Tensor | None) -> Tensor:
    if reach == 0:
        return gate
    pooled = F.max_pool2d(gate, 2 * reach + 1, stride=1, padding=reach)
    return pooled if valid is None else pooled * valid


@dataclass(frozen=True)
class Work:
    """What one sparse convolution really computed, over all images and levels of a batch.

    Attributes:
        macs: multiply-adds per row.
        rows: rows that were asked for, a number or an int tensor (1,) that stayed on its device.
        tile: rows are computed in multiples of it.
        dense: every position was computed, whatever was asked for: this many rows; None when only `rows` were.
        node: which node of which branch.
    """

    macs: float
    rows: Tensor | int
    tile: int = 1
    dense: int | None = None
    node: str = ""

    def asked(self) -> Tensor | float:
        """Multiply-adds of the rows that were asked for."""
        return self.rows * self.macs

    def executed(self) -> Tensor | float:
        """Multiply-adds that were taken, tiles included."""
        rows = self.rows if self.dense is None else self.dense
        return -(-rows // self.tile) * self.tile * self.macs


@dataclass
class Routing:
    """Everything a dynamic head decided on a batch. Budgets, reports, pictures and sparse execution read this value.

    All costs are multiply-adds per image, shape (B,): `soft` weighs positions by their gate (differentiable), `used`
    counts executed positions, `full` is what the same head costs with every gate open, `overhead` is what the routers
    themselves cost (in none of the other three, as in the papers).

    Attributes:
        gates: what was decided.
        work: what the gated paths then really computed: tiles and dense executions count in full.
    """

    gates: list[PathGate] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)

    def soft(self, detach: Sequence[str] = ()) -> Tensor:
        """Soft cost; gates of the paths named in `detach` add to the value but get no gradient."""
        return self._sum(lambda gate: gate, detach)

    def used(self) -> Tensor:
        with torch.no_grad():
            return self._sum(lambda gate: (gate > 0).to(gate.dtype), (), dense_counts=True)

    def full(self) -> Tensor:
        with torch.no_grad():
            return self._sum(torch.ones_like, ())

    def overhead(self) -> Tensor:
        return torch.stack([_wide(item.positions()) * item.router_macs for item in self.gates]).sum(0)

    def asked(self) -> Tensor:
        """Multiply-adds of the gated convolutions for the whole batch, where open gates ask for them; scalar."""
        return self._total([item.asked() for item in self.work])

    def executed(self) -> Tensor:
        """Multiply-adds that these convolutions took, scalar, on the device.

        Unlike `used` it knows how they were run: rows come in tiles, and a dense execution computes every position.
        Norms are in neither of the two.
        """
        return self._total([item.executed() for item in self.work])

    def _total(self, costs: Sequence[Tensor | float]) -> Tensor:
        device = self.gates[0].gate.device
        parts = [_wide(torch.as_tensor(cost, device=device).flatten()) for cost in costs]
        return torch.cat(parts).sum() if parts else torch.zeros((), device=device)

    def positions(self) -> Tensor:
        """(B,) positions of the pyramid that were routed."""
        first = self.gates[0]
        return torch.stack(
            [item.positions() for item in self.gates if (item.node, item.path) == (first.node, first.path)]
        ).sum(0)

    def used_ratio(self) -> Tensor:
        """(B,) share of the full cost that was executed."""
        return self.used() / self.full()

    def _sum(self, weigh: Callable[[Tensor], Tensor], detach: Sequence[str], *, dense_counts: bool = False) -> Tensor:
        # Gates of equal geometry are stacked along channels: a few pooled sums instead of one per gate.
        groups: dict[tuple[str, int, tuple[ConvCost, ...], bool], list[PathGate]] = defaultdict(list)
        for item in self.gates:
            groups[item.path, item.level, item.costs, item.sparse].append(item)
        total: Tensor | None = None
        for (path, _, costs, sparse), items in groups.items():
            gate = torch.cat([item.gate for item in items], 1).float()
            weight = weigh(gate.detach() if path in detach else gate)
            if dense_counts and not sparse:
                weight = torch.ones_like(gate)
            if items[0].valid is not None:
                weight = weight * items[0].valid
            for cost in costs:
                part = _wide(_dilate(weight, cost.reach, items[0].valid).sum((1, 2, 3))) * cost.macs
                total = part if total is None else total + part
        if total is None:
            raise ValueError("this routing has no gates, so it has no cost")
        return total


@dataclass
class Routes:
    """Which way every image of a batch took through a cascade.

    Attributes:
        hard: (B,) bool on the CPU: the second detector's answer was asked for.
        easiness: (B,) logits of the router on the CPU; difficulty is 1 - sigmoid. None where no router was asked.
        first: what the first detector's head decided on its images, those that are not hard, in their order.
        second: what the second's decided on the hard ones.
    """

    hard: Tensor
    easiness: Tensor | None = None
    first: Routing | None = None
    second: Routing | None = None

    def parts(self) -> list[tuple[bool, list[int], Routing | None]]:
        """Of either route that was taken: whether it is the hard one, its images, and what its head decided."""
        ways = [(False, (~self.hard).nonzero()[:, 0].tolist(), self.first)]
        ways += [(True, self.hard.nonzero()[:, 0].tolist(), self.second)]
        return [way for way in ways if way[1]]

    def of(self, image: int) -> tuple[Routing | None, int]:
        """What a head decided on an image, and its index in there."""
        for _, indices, routing in self.parts():
            if image in indices:
                return routing, indices.index(image)
        raise IndexError(f"there is no image {image} in this batch")


@dataclass
class HeadOutput:
    """Features of a head, finest level first: for classification, for regression, and what was routed on the way."""

    cls: list[Tensor]
    reg: list[Tensor]
    routing: Routing | None = None


@dataclass
class Losses:
    """Named scalar losses of a batch, ready to be summed (weights applied), and the routing behind them."""

    terms: dict[str, Tensor]
    routing: Routing | None = None

    @property
    def total(self) -> Tensor:
        return torch.stack(list(self.terms.values())).sum()
