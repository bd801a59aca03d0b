"""The anchor-based YOLO in Python floats: one loop per sentence of its description, no tensor operation in between.

Boxes are [x1, y1, x2, y2] in pixels. Where float32 cannot be trusted to decide as float64 does, `AmbiguousError` rises.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from anchor_oracles import AmbiguousError, Box, bce, compare, iou, sigmoid, target_of
from hypothesis import strategies as st
from torch import Tensor

from dyndet.ops.grid import valid_masks
from dyndet.structures import Target

STRIDES = [8, 16, 32]
CANVAS = (64, 96)
ANCHORS = [
    [(9.0, 8.0), (14.0, 22.0), (24.0, 13.0)],
    [(20.0, 31.0), (34.0, 24.0), (30.0, 50.0)],
    [(50.0, 40.0), (60.0, 64.0), (96.0, 60.0)],
]
BALANCE = {3: [4.0, 1.0, 0.4], 4: [4.0, 1.0, 0.25, 0.06]}

Level = list[list[list[list[list[list[float]]]]]]
"""image, anchor, row, column, number."""
Place = tuple[int, int, int, int, int]
"""level, anchor, row, column, object."""


def numbers(raw: Sequence[dict[str, Tensor]]) -> list[Level]:
    return [level["pred"].detach().double().tolist() for level in raw]


def split(box: Box) -> tuple[float, float, float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], box[3] - box[1]


def decode(row: Sequence[float], j: int, i: int, anchor: Sequence[float], stride: int) -> list[float]:
    """x, y, w, h in pixels."""
    sx, sy, sw, sh = (sigmoid(value) for value in row[:4])
    x, y = (2 * sx - 0.5 + j) * stride, (2 * sy - 0.5 + i) * stride
    return [x, y, (2 * sw) ** 2 * anchor[0], (2 * sh) ** 2 * anchor[1]]


def corners(xywh: Sequence[float]) -> list[float]:
    x, y, w, h = xywh
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


# Assignment


def propose(
    boxes: Sequence[Box],
    size: tuple[int, int],
    anchors: Sequence[Sequence[Sequence[float]]] = ANCHORS,
    strides: Sequence[int] = STRIDES,
) -> list[Place]:
    """Candidates in an image of this height and width."""
    found = []
    for level, stride in enumerate(strides):
        rows, columns = (-(-side // stride) for side in size)
        for step in ("own", "left", "upper", "right", "lower"):
            for a, anchor in enumerate(anchors[level]):
                for g, box in enumerate(boxes):
                    x, y, w, h = (value / stride for value in split(box))
                    if min(w, h) <= 0:
                        continue
                    wa, ha = anchor[0] / stride, anchor[1] / stride
                    if compare(max(w / wa, wa / w, h / ha, ha / h), 4.0) >= 0:
                        continue
                    j, i = math.floor(x), math.floor(y)
                    if step == "left":
                        near, j = x % 1 < 0.5 and x > 1, j - 1
                    elif step == "upper":
                        near, i = y % 1 < 0.5 and y > 1, i - 1
                    elif step == "right":  # published: also at a distance of exactly 0, a cell that cannot reach x
                        near, j = 0 < (columns - x) % 1 < 0.5 and columns - x > 1, j + 1
                    elif step == "lower":
                        near, i = 0 < (rows - y) % 1 < 0.5 and rows - y > 1, i + 1
                    else:
                        near = True
                    if near:
                        found.append((level, a, min(max(i, 0), rows - 1), min(max(j, 0), columns - 1), g))
    return found


def costs(
    row: Sequence[float], predicted: Box, boxes: Sequence[Box], labels: Sequence[int]
) -> tuple[list[float], list[float]]:
    """IoU and cost of one candidate for every object."""
    overlaps = [iou(box, predicted) for box in boxes]
    q = [math.sqrt(sigmoid(value) * sigmoid(row[4])) for value in row[5:]]
    q = [min(max(value, 1e-7), 1 - 1e-7) for value in q]
    found = []
    for label, overlap in zip(labels, overlaps, strict=True):
        cls = sum(-math.log(value if k == label else 1 - value) for k, value in enumerate(q))
        found.append(cls + 3 * -math.log(overlap + 1e-8))
    return overlaps, found


def match(
    levels: Sequence[Level],
    image: int,
    boxes: Sequence[Box],
    labels: Sequence[int],
    places: Sequence[Place],
    topk: int,
    anchors: Sequence[Sequence[Sequence[float]]] = ANCHORS,
    strides: Sequence[int] = STRIDES,
) -> list[Place]:
    """Candidates that some object of the image keeps, with that object."""
    table = []
    for level, a, i, j, _ in places:
        row = levels[level][image][a][i][j]
        table.append(costs(row, corners(decode(row, j, i, anchors[level][a], strides[level])), boxes, labels))
    takers: dict[int, list[int]] = {}
    for g in range(len(boxes)) if places else ():
        best = sorted((overlaps[g] for overlaps, _ in table), reverse=True)[:topk]
        if abs(sum(best) - round(sum(best))) < 1e-5:
            raise AmbiguousError
        number = max(int(sum(best)), 1)
        ranked = sorted(range(len(table)), key=lambda m: table[m][1][g])
        if number < len(ranked):
            compare(table[ranked[number - 1]][1][g], table[ranked[number]][1][g])
        for m in ranked[:number]:
            takers.setdefault(m, []).append(g)
    kept = []
    for m, (level, a, i, j, _) in enumerate(places):
        if m in takers:
            best = takers[m][0]
            for g in takers[m][1:]:
                if compare(table[m][1][g], table[m][1][best]) < 0:
                    best = g
            kept.append((level, a, i, j, best))
    return kept


# Losses


def complete_iou(predicted: Sequence[float], wanted: Sequence[float], eps: float = 1e-7) -> float:
    """Of two x, y, w, h."""
    a, b = corners(predicted), corners(wanted)
    w1, h1, w2, h2 = a[2] - a[0], a[3] - a[1] + eps, b[2] - b[0], b[3] - b[1] + eps
    inner = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    overlap = inner / (w1 * h1 + w2 * h2 - inner + eps)
    diagonal = (max(a[2], b[2]) - min(a[0], b[0])) ** 2 + (max(a[3], b[3]) - min(a[1], b[1])) ** 2 + eps
    distance = (predicted[0] - wanted[0]) ** 2 + (predicted[1] - wanted[1]) ** 2
    v = 4 / math.pi**2 * (math.atan(w2 / (h2 + eps)) - math.atan(w1 / (h1 + eps))) ** 2
    return overlap - distance / diagonal - v / (v - overlap + 1 + eps) * v


def expected_losses(
    scene: YoloScene, raw: Sequence[dict[str, Tensor]], *, ota: bool = True, topk: int = 10, ignore: bool = True
) -> dict[str, float]:
    """Without gains: sums over levels, those of objectness balanced."""
    levels = numbers(raw)
    places = []
    for image, (size, boxes, labels) in enumerate(zip(scene.sizes, scene.boxes(), scene.labels(), strict=True)):
        found = propose(boxes, size if ignore else CANVAS)
        found = match(levels, image, boxes, labels, found, topk) if ota else found
        places += [(image, *place) for place in found]
    losses = {"box": 0.0, "obj": 0.0, "cls": 0.0}
    for level, (stride, balance) in enumerate(zip(STRIDES, BALANCE[3], strict=True)):
        box, cls, quality = [], [], {}
        for image, _, a, i, j, g in (place for place in places if place[1] == level):
            row = levels[level][image][a][i][j]
            x, y, w, h = (value / stride for value in decode(row, j, i, ANCHORS[level][a], stride))
            wx, wy, ww, wh = (value / stride for value in split(scene.boxes()[image][g]))
            c = complete_iou([x - j, y - i, w, h], [wx - j, wy - i, ww, wh])
            box.append(1 - c)
            quality[image, a, i, j] = max(c, 0.0)
            cls += [bce(value, float(k == scene.labels()[image][g])) for k, value in enumerate(row[5:])]
        obj = [
            bce(row[4], quality.get((image, a, i, j), 0.0))
            for image, maps in enumerate(levels[level])
            for a, rows in enumerate(maps)
            for i, columns in enumerate(rows)
            for j, row in enumerate(columns)
            if not ignore or (i * stride < scene.sizes[image][0] and j * stride < scene.sizes[image][1])
        ]
        losses["box"] += sum(box) / max(len(box), 1)
        losses["obj"] += balance * sum(obj) / len(obj)
        losses["cls"] += sum(cls) / max(len(cls), 1) if scene.classes > 1 else 0.0
    return losses


# Random images


@dataclass
class YoloScene:
    """A batch of images of different sizes, padded to `CANVAS`."""

    sizes: list[tuple[int, int]]
    targets: list[Target]
    classes: int
    seed: int = 0

    def valid(self) -> list[Tensor] | None:
        shapes = [(CANVAS[0] // stride, CANVAS[1] // stride) for stride in STRIDES]
        return valid_masks(torch.tensor(self.sizes), shapes, STRIDES)

    def boxes(self) -> list[list[list[float]]]:
        return [target.boxes.double().tolist() for target in self.targets]

    def labels(self) -> list[list[int]]:
        return [target.labels.tolist() for target in self.targets]

    def raw(self, spread: float = 1.0) -> list[dict[str, Tensor]]:
        return random_preds(len(self.sizes), self.classes, seed=self.seed, spread=spread)


def random_preds(
    batch: int, classes: int, *, seed: int = 0, spread: float = 1.0, canvas: tuple[int, int] = CANVAS
) -> list[dict[str, Tensor]]:
    """Raw maps as leaves that take gradients."""
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for stride in STRIDES:
        shape = (batch, 3, canvas[0] // stride, canvas[1] // stride, 5 + classes)
        maps.append({"pred": (torch.randn(shape, generator=generator) * spread).requires_grad_()})
    return maps


@st.composite
def yolo_scenes(draw: st.DrawFn) -> YoloScene:
    """One to three images with up to five boxes each, boxes given twice and neighbours in one cell among them."""
    classes = draw(st.integers(1, 3))
    sizes, targets = [], []
    for _ in range(draw(st.integers(1, 3))):
        height, width = draw(st.sampled_from([CANVAS[0], 41, 32])), draw(st.sampled_from([CANVAS[1], 57, 32]))
        boxes: list[list[float]] = []
        for _ in range(draw(st.integers(0, 4))):
            x, y = draw(st.integers(0, 4 * width - 8)) / 4, draw(st.integers(0, 4 * height - 8)) / 4
            w, h = draw(st.integers(4, 4 * width)) / 4, draw(st.integers(4, 4 * height)) / 4
            boxes.append([x, y, min(x + w, width), min(y + h, height)])
        if boxes and draw(st.booleans()):
            shift = draw(st.sampled_from([0.0, 0.25, 1.0]))
            x1, y1, x2, y2 = draw(st.sampled_from(boxes))
            boxes.append([x1, y1, max(x2 - shift, x1 + 1), max(y2 - shift, y1 + 1)])
        labels = [draw(st.integers(0, classes - 1)) for _ in boxes]
        sizes.append((height, width))
        targets.append(target_of(boxes, labels))
    return YoloScene(sizes, targets, classes, draw(st.integers(0, 999)))
