"""What DynamicDet's files hold: the published map of layer numbers, and the shapes that follow from the networks.

Written from the map's rows and the description of the networks, not from the converter's table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Items = Iterator[tuple[str, tuple[int, ...]]]
Narrow = Callable[[int], int]

_BACKBONE_MAP = {
    "v7": """
        stem: 0,1,2 ; 3
        ELAN (first, second, chain, out): 4,5,6-9,11 · 17,18,19-22,24 · 30,31,32-35,37 · 43,44,45-48,50
        transitions (pool, pre, down): 13,14,15 · 26,27,28 · 39,40,41
        second stem: 5,6,8 ; 9
        second ELAN: 11,12,13-16,18 · 25,26,27-30,32 · 39,40,41-44,46 · 53,54,55-58,60
        second transitions: 20,21,22 · 34,35,36 · 48,49,50
    """,
    "x": """
        stem: 0,1,2 ; 3
        ELAN (first, second, chain, out): 4,5,6-11,13 · 19,20,21-26,28 · 34,35,36-41,43 · 49,50,51-56,58
        transitions (pool, pre, down): 15,16,17 · 30,31,32 · 45,46,47
        second stem: 5,6,8 ; 9
        second ELAN: 11,12,13-18,20 · 27,28,29-34,36 · 43,44,45-50,52 · 59,60,61-66,68
        second transitions: 22,23,24 · 38,39,40 · 54,55,56
    """,
    "w6": """
        stem: 1
        ELAN (first, second, chain, out): 3,4,5-8,10 · 12,13,14-17,19 · 21,22,23-26,28 · 30,31,32-35,37 · 39,40,41-44,46
        strided convolutions: 2 · 11 · 20 · 29 · 38
        second stem: 5
        second ELAN: 8,9,10-13,15 · 18,19,20-23,25 · 28,29,30-33,35 · 38,39,40-43,45 · 48,49,50-53,55
        second strided convolutions: 6 · 16 · 26 · 36 · 46
    """,
}
_HEAD_MAP = {
    "v7": """0 spp; 1; 3; 5,6,7-10,12; 13; 15; 17,18,19-22,24; 26,27,28; 30,31,32-35,37; 39,40,41; 43,44,45-48,50;
        51-53 out; 54 detect""",
    "x": """0 spp; 1; 3; 5,6,7-12,14; 15; 17; 19,20,21-26,28; 30,31,32; 34,35,36-41,43; 45,46,47; 49,50,51-56,58;
        59-61 out; 62 detect""",
    "w6": """0 spp; 1; 3; 5,6,7-10,12; 13; 15; 17,18,19-22,24; 25; 27; 29,30,31-34,36; 37; 39,40,41-44,46; 47;
        49,50,51-54,56; 57; 59,60,61-64,66; 67-70 out; 71 detect""",
}


def numbers(cell: str) -> list[int]:
    """ "4,5,6-9" -> [4, 5, 6, 7, 8, 9]."""
    found: list[int] = []
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", cell):
        found += range(int(first), int(last or first) + 1)
    return found


@dataclass(frozen=True)
class Variant:
    """One of the three networks: its numbers in the files, and its widths as described.

    Attributes:
        key: of the maps.
        stem: C of the stem's convolutions.
        stages: C after the entrance of a stage, w of its ELAN, C of its output.
        inside: C of the neck's levels, finest first.
        branches: w of the neck's ELANs.
        half: the neck's ELANs have chains of w / 2.
        taps: of the backbone's ELANs.
        neck_taps: of the neck's.
        anchors: pixels.
    """

    key: str
    stem: tuple[int, ...]
    stages: tuple[tuple[int, int, int], ...]
    inside: tuple[int, ...]
    branches: tuple[int, ...]
    half: bool
    taps: tuple[int, ...]
    neck_taps: tuple[int, ...]
    anchors: tuple[tuple[int, ...], ...]

    @property
    def pool(self) -> bool:
        return self.key != "w6"

    @property
    def levels(self) -> int:
        return len(self.inside)

    def backbone(self, second: bool) -> tuple[list[int], list[list[int]], list[list[int]]]:
        """Numbers of the stem's convolutions, of every entrance, of every ELAN."""
        rows = [line.partition(": ")[2] for line in _BACKBONE_MAP[self.key].strip().splitlines()][3 * second :]
        stem, _, entrance = rows[0].partition(";")
        entrances = [numbers(cell) for cell in rows[2].split("·")]
        if entrance:  # the first one is a convolution and stands with the stem
            entrances = [numbers(entrance), *entrances]
        return numbers(stem), entrances, [numbers(cell) for cell in rows[1].split("·")]

    def head(self) -> list[list[int]]:
        """Numbers of every block, in the order of the map."""
        return [numbers(cell) for cell in _HEAD_MAP[self.key].split(";")]


_P5 = ((12, 16, 19, 36, 40, 28), (36, 75, 76, 55, 72, 146), (142, 110, 192, 243, 459, 401))
_P6 = (
    (19, 27, 44, 40, 38, 94), (96, 68, 86, 152, 180, 137), (140, 301, 303, 264, 238, 542),
    (436, 615, 739, 380, 925, 792),
)  # fmt: skip
VARIANTS = {
    "yolov7": Variant(
        "v7", (32, 64, 64), ((128, 64, 256), (256, 128, 512), (512, 256, 1024), (1024, 256, 1024)),
        (128, 256, 512), (128, 256, 512), True, (4, 2), (4, 3, 2, 1), _P5,
    ),
    "yolov7x": Variant(
        "x", (40, 80, 80), ((160, 64, 320), (320, 128, 640), (640, 256, 1280), (1280, 256, 1280)),
        (160, 320, 640), (128, 256, 512), False, (6, 4, 2), (6, 4, 2), _P5,
    ),
    "yolov7w6": Variant(
        "w6", (64,), ((128, 64, 128), (256, 128, 256), (512, 256, 512), (768, 384, 768), (1024, 512, 1024)),
        (128, 256, 384, 512), (128, 256, 384, 512), True, (4, 2), (4, 3, 2, 1), _P6,
    ),
}  # fmt: skip


def block(name: str, out: int, into: int, kernel: int = 1) -> Items:
    yield f"{name}.conv.weight", (out, into, kernel, kernel)
    yield from norm(f"{name}.bn", out)


def norm(name: str, channels: int) -> Items:
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{part}", (channels,)
    yield f"{name}.num_batches_tracked", ()


def elan(prefix: str, at: Sequence[int], into: int, w: int, chain: int, taps: Sequence[int], out: int) -> Items:
    first, second, *links, last = at
    yield from block(f"{prefix}.{first}", w, into)
    yield from block(f"{prefix}.{second}", w, into)
    for number, (a, b) in zip(links, pairwise([w] + [chain] * len(links)), strict=True):
        yield from block(f"{prefix}.{number}", b, a, 3)
    yield from block(f"{prefix}.{last}", out, len(taps) * chain + 2 * w)


def halving(prefix: str, at: Sequence[int], into: int, out: int) -> Items:
    """A strided convolution, or a transition, either way of which has half of the channels."""
    if len(at) == 1:
        yield from block(f"{prefix}.{at[0]}", out, into, 3)
    else:
        pool, before, down = at
        yield from block(f"{prefix}.{pool}", out // 2, into)
        yield from block(f"{prefix}.{before}", out // 2, into)
        yield from block(f"{prefix}.{down}", out // 2, out // 2, 3)


def backbone(prefix: str, variant: Variant, n: Narrow, *, second: bool) -> Items:
    stem, entrances, elans = variant.backbone(second)
    widths = [3 if variant.pool else 12, *map(n, variant.stem)]
    for number, (into, out) in zip(stem, pairwise(widths), strict=True):
        yield from block(f"{prefix}.{number}", out, into, 3)
    into = widths[-1]
    for enter, at, (entered, w, out) in zip(entrances, elans, variant.stages, strict=True):
        yield from halving(prefix, enter, into, n(entered))
        yield from elan(prefix, at, n(entered), n(w), n(w), variant.taps, n(out))
        into = n(out)


def links(variant: Variant, n: Narrow) -> Items:
    """From source k to the stages 0..k, whose channels after the entrance it gives; W6 has none at the stem."""
    sources = [n(out) for _, _, out in variant.stages]
    readers = [n(entered) for entered, _, _ in variant.stages]
    if variant.pool:
        sources, readers = [n(variant.stem[-1]), *sources], [n(variant.stem[1]), *readers]
    for k, into in enumerate(sources):
        yield f"model_b2.{k}.conv.weight", (sum(readers[: k + 1]), into, 1, 1)
        yield f"model_b2.{k}.conv.bias", (sum(readers[: k + 1]),)


def head(prefix: str, shift: int, variant: Variant, n: Narrow, classes: int, *, implicit: bool = True) -> Items:
    at = iter([[shift + number for number in cell] for cell in variant.head()])
    maps = [n(out) for _, _, out in variant.stages][-variant.levels :]
    inside = [n(c) for c in variant.inside]
    chains = [n(w // 2 if variant.half else w) for w in variant.branches]

    def stage(level: int, into: int) -> Items:
        return elan(prefix, next(at), into, n(variant.branches[level]), chains[level], variant.neck_taps, inside[level])

    spp, h = f"{prefix}.{next(at)[0]}", inside[-1]
    shapes = {1: (maps[-1], 1), 2: (maps[-1], 1), 3: (h, 3), 4: (h, 1), 5: (4 * h, 1), 6: (h, 3), 7: (2 * h, 1)}
    for number, (into, kernel) in shapes.items():
        yield from block(f"{spp}.cv{number}", h, into, kernel)
    for level in reversed(range(variant.levels - 1)):
        yield from block(f"{prefix}.{next(at)[0]}", inside[level], inside[level + 1])  # to be enlarged
        yield from block(f"{prefix}.{next(at)[0]}", inside[level], maps[level])
        yield from stage(level, 2 * inside[level])
    for level in range(1, variant.levels):
        halved = 2 * inside[level - 1] if variant.pool else inside[level]
        yield from halving(prefix, next(at), inside[level - 1], halved)
        yield from stage(level, halved + inside[level])
    for number, c in zip(next(at), inside, strict=True):
        if variant.key == "v7":
            for branch, kernel in (("rbr_dense", 3), ("rbr_1x1", 1)):
                yield f"{prefix}.{number}.{branch}.0.weight", (2 * c, c, kernel, kernel)
                yield from norm(f"{prefix}.{number}.{branch}.1", 2 * c)
        else:
            yield from block(f"{prefix}.{number}", 2 * c, c, 3)
    (detect,) = next(at)
    outputs = 3 * (5 + classes)
    yield f"{prefix}.{detect}.anchors", (variant.levels, 3, 2)
    yield f"{prefix}.{detect}.anchor_grid", (variant.levels, 1, 3, 1, 1, 2)
    for level, c in enumerate(inside):
        yield f"{prefix}.{detect}.m.{level}.weight", (outputs, 2 * c, 1, 1)
        yield f"{prefix}.{detect}.m.{level}.bias", (outputs,)
        if implicit:
            yield f"{prefix}.{detect}.ia.{level}.implicit", (1, 2 * c, 1, 1)
            yield f"{prefix}.{detect}.im.{level}.implicit", (1, outputs, 1, 1)


def router(variant: Variant, n: Narrow) -> Items:
    read = n(variant.stem[-1]) + sum(n(out) for _, _, out in variant.stages)
    yield "router.layer1.weight", (read // 4, read, 1, 1)
    yield "router.layer1.bias", (read // 4,)
    yield "router.layer2.weight", (1, read // 4, 1, 1)
    yield "router.layer2.bias", (1,)


def cascade(
    variant: Variant, *, routed: bool = True, narrow: Narrow = lambda c: c, classes: int = 80
) -> dict[str, tuple[int, ...]]:
    """The tensors of a cascade's file, by name."""
    parts = [
        backbone("model_b", variant, narrow, second=False),
        links(variant, narrow),
        backbone("model_b2", variant, narrow, second=True),
        head("model_h", 0, variant, narrow, classes),
        head("model_h2", 0, variant, narrow, classes),
    ]
    if routed:
        parts.append(router(variant, narrow))
    return dict(item for part in parts for item in part)


def plain(variant: Variant, *, implicit: bool, narrow: Narrow = lambda c: c) -> dict[str, tuple[int, ...]]:
    """The same network alone, numbered through."""
    body = dict(backbone("model", variant, narrow, second=False))
    layers = 1 + max(int(name.split(".")[1]) for name in body)
    return body | dict(head("model", layers, variant, narrow, 80, implicit=implicit))


def with_anchors(weights: dict[str, Tensor], variant: Variant) -> dict[str, Tensor]:
    """The published anchors in both buffers of every predictor."""
    pixels = torch.tensor(variant.anchors, dtype=torch.float32).view(variant.levels, 3, 2)
    strides = torch.tensor([8 * 2**level for level in range(variant.levels)]).view(-1, 1, 1)
    for name, value in weights.items():
        if name.endswith(".anchors"):
            weights[name] = (pixels / strides).to(value.dtype)
        elif name.endswith(".anchor_grid"):
            weights[name] = pixels.view(value.shape).to(value.dtype)
    return weights
