"""Dense detection spelled out in Python floats: one loop per sentence of the papers, no tensor operation in between.

Boxes are [x1, y1, x2, y2]. Where float32 cannot be trusted to decide as float64 does, they raise `AmbiguousError`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from dyndet.ops.grid import valid_masks
from dyndet.structures import Target

Box = Sequence[float]

STRIDES = [8, 16]
SHAPES = [(6, 7), (3, 4)]
HEIGHT, WIDTH = 48, 56
BACKGROUND, IGNORED = -1, -2


class AmbiguousError(Exception):
    """Too close to call in float32."""


def compare(a: float, b: float) -> int:
    """Sign of a - b."""
    if a != b and abs(a - b) < 2e-5 * max(abs(a), abs(b)):
        raise AmbiguousError
    return (a > b) - (a < b)


# Boxes


def area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def iou(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0) * max(height, 0)
    union = area(a) + area(b) - overlap
    return overlap / union if union > 0 else 0.0


def giou_loss(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0) * max(height, 0)
    union = area(a) + area(b) - overlap
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return 1 - overlap / union + (hull - union) / hull


def encode(anchor: Box, box: Box, std: Sequence[float]) -> list[float]:
    wa, ha, w, h = anchor[2] - anchor[0], anchor[3] - anchor[1], box[2] - box[0], box[3] - box[1]
    dx = ((box[0] + box[2]) - (anchor[0] + anchor[2])) / 2 / wa
    dy = ((box[1] + box[3]) - (anchor[1] + anchor[3])) / 2 / ha
    return [d / s for d, s in zip([dx, dy, math.log(w / wa), math.log(h / ha)], std, strict=True)]


def decode(anchor: Box, deltas: Sequence[float], std: Sequence[float], *, lower: bool = True) -> list[float]:
    most = math.log(1000 / 16)
    wa, ha = anchor[2] - anchor[0], anchor[3] - anchor[1]
    dx, dy, dw, dh = (d * s for d, s in zip(deltas, std, strict=True))
    dw, dh = min(dw, most), min(dh, most)
    if lower:
        dw, dh = max(dw, -most), max(dh, -most)
    x, y = (anchor[0] + anchor[2]) / 2 + dx * wa, (anchor[1] + anchor[3]) / 2 + dy * ha
    w, h = wa * math.exp(dw), ha * math.exp(dh)
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def centerness(ltrb: Sequence[float]) -> float:
    left, top, right, bottom = ltrb
    return math.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))


def distances(x: float, y: float, box: Box) -> list[float]:
    return [x - box[0], y - box[1], box[2] - x, box[3] - y]


# Losses of single numbers


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def bce(logit: float, wanted: float) -> float:
    return max(logit, 0) - logit * wanted + math.log1p(math.exp(-abs(logit)))


def focal(logit: float, positive: bool, alpha: float = 0.25, gamma: float = 2.0) -> float:
    p = sigmoid(logit)
    if positive:
        return alpha * (1 - p) ** gamma * bce(logit, 1)
    return (1 - alpha) * p**gamma * bce(logit, 0)


def smooth_l1(x: float, beta: float) -> float:
    return 0.5 * x * x / beta if abs(x) < beta else abs(x) - 0.5 * beta


def divisors(mode: str, counts: Sequence[int]) -> list[float]:
    """Of every image, in a single process."""
    if mode == "per_image":
        return [float(max(count, 1) * len(counts)) for count in counts]
    if mode == "images":
        return [float(sum(max(count, 1) for count in counts))] * len(counts)
    assert mode == "total"
    return [float(max(sum(counts), 1))] * len(counts)


# The pyramid


def square_anchors(scale: float, offset: float) -> list[list[list[float]]]:
    return grid_anchors([(scale, scale)], offset)


def grid_anchors(sides: Sequence[tuple[float, float]], offset: float) -> list[list[list[float]]]:
    """Per level, row-major positions and then the sides (width, height in strides)."""
    levels = []
    for (height, width), s in zip(SHAPES, STRIDES, strict=True):
        level = []
        for i in range(height):
            for j in range(width):
                x, y = (j + offset) * s, (i + offset) * s
                for w, h in sides:
                    level.append([x - w * s / 2, y - h * s / 2, x + w * s / 2, y + h * s / 2])
        levels.append(level)
    return levels


def flags(size: Sequence[int], per_position: int, divisor: int = 1) -> list[bool]:
    """Whether each anchor's position starts inside an image of this size, rounded up to the divisor."""
    height, width = (-(-side // divisor) * divisor for side in size)
    return [
        i * stride < height and j * stride < width
        for (rows, columns), stride in zip(SHAPES, STRIDES, strict=True)
        for i in range(rows)
        for j in range(columns)
        for _ in range(per_position)
    ]


def rows_of(raw: Sequence[dict[str, Tensor]], name: str, image: int, width: int) -> list[list[float]]:
    """What the maps say about every anchor, in the order of `grid_anchors`."""
    rows = []
    for level in raw:
        values = level[name].detach().double()[image].tolist()  # channel, row, column
        per_position = len(values) // width
        for i in range(len(values[0])):
            for j in range(len(values[0][0])):
                rows += [[values[a * width + d][i][j] for d in range(width)] for a in range(per_position)]
    return rows


# Assignments: per anchor the index of its box, BACKGROUND or IGNORED


def atss_match(levels: Sequence[Sequence[Box]], boxes: Sequence[Box], valid: Sequence[bool], topk: int) -> list[int]:
    every = [anchor for level in levels for anchor in level]
    wanting: dict[int, list[tuple[float, int]]] = {}
    for g, box in enumerate(boxes):
        centre = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        candidates, start = [], 0
        for level in levels:
            ranked = sorted(
                (math.dist(centre, ((a[0] + a[2]) / 2, (a[1] + a[3]) / 2)), start + index)
                for index, a in enumerate(level)
                if valid[start + index]
            )
            if len(ranked) > topk and ranked[topk][0] - ranked[topk - 1][0] < 1e-3:
                raise AmbiguousError
            candidates += [index for _, index in ranked[:topk]]
            start += len(level)
        overlaps = [iou(every[index], box) for index in candidates]
        mean = sum(overlaps) / len(overlaps)
        threshold = mean + math.sqrt(sum((o - mean) ** 2 for o in overlaps) / (len(overlaps) - 1))
        for index, overlap in zip(candidates, overlaps, strict=True):
            a = every[index]
            if abs(overlap - threshold) < 2e-5 * threshold:
                raise AmbiguousError
            edge = min(distances((a[0] + a[2]) / 2, (a[1] + a[3]) / 2, box))
            if abs(edge - 0.01) < 1e-4:
                raise AmbiguousError
            if overlap >= threshold and edge > 0.01:
                wanting.setdefault(index, []).append((overlap, g))
    match = [BACKGROUND] * len(every)
    for index, offers in wanting.items():
        best = offers[0]
        for offer in offers[1:]:
            if compare(offer[0], best[0]) > 0:
                best = offer
        match[index] = best[1]
    return match


def iou_match(
    anchors: Sequence[Box],
    boxes: Sequence[Box],
    valid: Sequence[bool],
    *,
    positive: float = 0.5,
    negative: float = 0.4,
    low_quality: bool = True,
) -> list[int]:
    """Anchors that may not be chosen come out as BACKGROUND."""
    match = []
    for anchor, allowed in zip(anchors, valid, strict=True):
        best, owner = 0.0, BACKGROUND
        for g, box in enumerate(boxes):
            overlap = iou(anchor, box) if allowed else 0.0
            if compare(overlap, best) > 0:
                best, owner = overlap, g
        if compare(best, positive) >= 0:
            match.append(owner)
        else:
            match.append(BACKGROUND if compare(best, negative) < 0 else IGNORED)
    if low_quality:
        for g, box in enumerate(boxes):
            overlaps = [iou(anchor, box) if allowed else 0.0 for anchor, allowed in zip(anchors, valid, strict=True)]
            best = max(overlaps)
            for index, overlap in enumerate(overlaps):
                if best > 0 and compare(overlap, best) == 0:
                    match[index] = g
    return match


def fcos_match(boxes: Sequence[Box], *, offset: float, radius: float | None, strict: bool, base: float) -> list[int]:
    match = []
    for level, ((height, width), stride) in enumerate(zip(SHAPES, STRIDES, strict=True)):
        low = -1.0 if level == 0 else base * 2 ** (level - 1)
        high = 1e8 if level == len(SHAPES) - 1 else base * 2**level
        for i in range(height):
            for j in range(width):
                x, y = (j + offset) * stride, (i + offset) * stride
                smallest, owner = math.inf, BACKGROUND
                for g, box in enumerate(boxes):
                    ltrb = distances(x, y, box)
                    inside = min(ltrb) > 0
                    if radius is not None:
                        away = abs(x - (box[0] + box[2]) / 2), abs(y - (box[1] + box[3]) / 2)
                        inside = inside and max(away) < radius * stride
                    far = max(ltrb)
                    fits = low < far < high if strict else low <= far <= high
                    if inside and fits and area(box) < smallest:
                        smallest, owner = area(box), g
                match.append(owner)
    return match


# Random images


@dataclass
class Scene:
    """A batch of images of different sizes, padded to one."""

    sizes: list[tuple[int, int]]
    targets: list[Target]
    classes: int
    seed: int

    def valid(self) -> list[Tensor] | None:
        return valid_masks(torch.tensor(self.sizes), SHAPES, STRIDES)

    def boxes(self, image: int) -> list[list[float]]:
        return self.targets[image].boxes.double().tolist()

    def labels(self, image: int) -> list[int]:
        return self.targets[image].labels.tolist()

    def raw(self, per_position: int = 1, *, spread: float = 0.6) -> list[dict[str, Tensor]]:
        return random_maps(len(self.sizes), self.classes, per_position, seed=self.seed, spread=spread)


def random_maps(
    batch: int, classes: int, per_position: int = 1, *, seed: int = 0, spread: float = 0.6
) -> list[dict[str, Tensor]]:
    """Raw maps as leaves that take gradients."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(channels: int, shape: tuple[int, int], std: float) -> Tensor:
        return (torch.randn(batch, channels, *shape, generator=generator) * std).requires_grad_()

    return [
        {
            "cls": leaf(per_position * classes, shape, 2.0),
            "box": leaf(per_position * 4, shape, spread),
            "centerness": leaf(per_position, shape, 2.0),
        }
        for shape in SHAPES
    ]


def target_of(boxes: Sequence[Box], labels: Sequence[int] | None = None) -> Target:
    wanted = torch.tensor([0] * len(boxes) if labels is None else list(labels), dtype=torch.int64)
    return Target(
        torch.tensor([list(box) for box in boxes], dtype=torch.float32).reshape(-1, 4),
        wanted,
        torch.zeros(len(boxes)).bool(),
    )


@st.composite
def scenes(draw: st.DrawFn, *, lattice: bool) -> Scene:
    """One to three images with up to four boxes each, one-pixel boxes and boxes given twice among them.

    Args:
        draw: from hypothesis.
        lattice: all coordinates are multiples of 1/4, so that float32 computes overlaps without rounding and ties are
            ties; otherwise no symmetry is left that could make one.
    """
    classes = draw(st.integers(1, 3))
    sizes, targets = [], []
    for _ in range(draw(st.integers(1, 3))):
        height, width = draw(st.sampled_from([HEIGHT, 33, 16, 2])), draw(st.sampled_from([WIDTH, 41, 16, 3]))
        boxes = []
        for _ in range(draw(st.integers(0, 3))):
            x, y = draw(st.integers(0, 4 * width - 4)) / 4, draw(st.integers(0, 4 * height - 4)) / 4
            if draw(st.integers(0, 3)):
                w, h = draw(st.integers(4, 4 * width)) / 4, draw(st.integers(4, 4 * height)) / 4
            else:
                w, h = 1.0, 1.0
            box = [x, y, min(x + w, width), min(y + h, height)]
            boxes.append(box if lattice else [0.97 * value + 0.0211 * (n + 1) for n, value in enumerate(box)])
        if boxes and draw(st.booleans()):
            boxes.append(draw(st.sampled_from(boxes)))
        labels = [draw(st.integers(0, classes - 1)) for _ in boxes]
        sizes.append((height, width))
        targets.append(target_of(boxes, labels))
    return Scene(sizes, targets, classes, draw(st.integers(0, 999)))
