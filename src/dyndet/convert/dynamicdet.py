"""DynamicDet's dynamic YOLOs, and the plain YOLOv7 networks that they are made of.

| release | known by |
| --- | --- |
| Dy-YOLOv7, -X, -W6 | `model_b`, and the number of `model_h2`'s last layer: 54, 62, 71; after step 1 without `router` |
| YOLOv7, -X, -W6 | `model` alone, and the number of its last layer: 105, 121, 118 |

Layers are known by number, those without tensors counted: `NETWORKS`. The first five of `model_b2` are the composite
links, layer 0 of a head is its SPPCSPC. The numbers of plain YOLOv7 are inferred from the other's: the same layers
under one prefix, those of the head after those of the backbone. W6 has to be without auxiliary heads ("deploy"), and no
norm folded into its convolution.

In the released Dy-YOLOv7-X, the convolutions of the second backbone's first `Transition` read the first backbone:
`detector.cross`. Both heads were trained with the anchors of the second, so both get these; where a search changed
them, files of step 2 have lost that and hold the configured ones again.

Weights are read when a user names a file, and none come with dyndet: DynamicDet is published for academic use only,
YOLOv7 under GPL-3.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyndet.convert.engine import Rule, drop
from dyndet.convert.recipe import Recipe, Shapes, has
from dyndet.convert.source import Source
from dyndet.convert.tensor_transforms import anchor_pairs, linear_of_1x1, without_batch
from dyndet.errors import UserError

NAME = "DynamicDet/YOLOv7"

_DYNAMICDET_TERMS = "DynamicDet is published for academic use only; commercial use needs its authors' permission"
_YOLOV7_TERMS = "YOLOv7 is published under GPL-3.0"


@dataclass(frozen=True)
class Backbone:
    """Numbers of a backbone's layers.

    Attributes:
        stem: its convolutions.
        enters: what follows before every ELAN: a convolution, or the first of a `Transition`.
        bodies: the first layer of every ELAN.
    """

    stem: Sequence[int]
    enters: Sequence[int]
    bodies: Sequence[int]


@dataclass(frozen=True)
class Head:
    """Numbers of the layers of a neck (its parts as in `YoloNeck`, finest first) and its predictor.

    Attributes:
        narrow: convolutions of the coarser map.
        laterals: convolutions of the backbone's map.
        top_down: the first layer of every ELAN.
        down: a convolution, or the first of a `Transition`.
        bottom_up: the first layer of every ELAN.
        outputs: the last convolutions.
        detect: the predictor.
    """

    narrow: Sequence[int]
    laterals: Sequence[int]
    top_down: Sequence[int]
    down: Sequence[int]
    bottom_up: Sequence[int]
    outputs: Sequence[int]
    detect: int


@dataclass(frozen=True)
class Network:
    """One of the three sizes.

    Attributes:
        experiment: of the plain network; the dynamic one's has "dy_" before it.
        chain: convolutions in the chain of every ELAN.
        pool: resolution is halved by a `Transition` (from the second stage on), not by a convolution.
        dynamic: keys of the dynamic one's configuration that its weights depend on.
        first: the backbone, the first one of two.
        second: the second backbone.
        head: either head.
    """

    experiment: str
    chain: int
    pool: bool
    dynamic: Mapping[str, Any]
    first: Backbone
    second: Backbone
    head: Head

    @property
    def layers(self) -> int:
        """Of the backbone; its last ELAN has two branches, the chain, what joins them, and the last convolution."""
        return self.first.bodies[-1] + self.chain + 4


NETWORKS = (
    Network(
        "yolov7",
        chain=4,
        pool=True,
        dynamic={"detector.first_link": 0},
        first=Backbone((0, 1, 2), (3, 13, 26, 39), (4, 17, 30, 43)),
        second=Backbone((5, 6, 8), (9, 20, 34, 48), (11, 25, 39, 53)),
        head=Head((13, 1), (15, 3), (17, 5), (26, 39), (30, 43), (51, 52, 53), 54),
    ),
    Network(
        "yolov7x",
        chain=6,
        pool=True,
        dynamic={"detector.first_link": 0, "detector.cross": 2},
        first=Backbone((0, 1, 2), (3, 15, 30, 45), (4, 19, 34, 49)),
        second=Backbone((5, 6, 8), (9, 22, 38, 54), (11, 27, 43, 59)),
        head=Head((15, 1), (17, 3), (19, 5), (30, 45), (34, 49), (59, 60, 61), 62),
    ),
    Network(
        "yolov7w6",
        chain=4,
        pool=False,
        dynamic={"detector.first_link": 1},
        first=Backbone((1,), (2, 11, 20, 29, 38), (3, 12, 21, 30, 39)),
        second=Backbone((5,), (6, 16, 26, 36, 46), (8, 18, 28, 38, 48)),
        head=Head((25, 13, 1), (27, 15, 3), (29, 17, 5), (37, 47, 57), (39, 49, 59), (67, 68, 69, 70), 71),
    ),
)

_SPP = {1: "before.0", 3: "before.1", 4: "before.2", 5: "after.0", 6: "after.1", 2: "bypass", 7: "out"}
_REP = {"rbr_dense.0": "wide", "rbr_dense.1": "wide_norm", "rbr_1x1.0": "point", "rbr_1x1.1": "point_norm"}
_ROUTER = (
    Rule(r"router\.layer1\.(?:\w+\.)?weight", "router.hidden.weight", linear_of_1x1),
    Rule(r"router\.layer1\.(?:\w+\.)?bias", "router.hidden.bias"),
    Rule(r"router\.layer2\.(?:\w+\.)?weight", "router.out.weight", linear_of_1x1),
    Rule(r"router\.layer2\.(?:\w+\.)?bias", "router.out.bias"),
)


def recognise(shapes: Shapes) -> bool:
    """Whether layers are numbered as in YOLO's files."""
    return has(shapes, r"model(_[bh]2?)?\.\d+\.(conv|m)\.")


def recipe(source: Source) -> Recipe:
    """The experiment of a release.

    Raises:
        UserError: if it is another network, or its norms are folded.
    """
    shapes = source.shapes
    dynamic = has(shapes, r"model_[bh]2?\.")
    prefix = "model_h2" if dynamic else "model"
    network, detect = _network(source, prefix, dynamic)
    if not has(shapes, r".+\.bn\."):
        raise UserError(f"{source.path} has its norms folded into convolutions: convert the file as it was trained")
    anchors = _anchors(source, detect)
    implicit = f"{detect}.ia.0.implicit" in shapes
    settings = {"predictor.implicit": implicit}
    if dynamic:
        settings |= network.dynamic
        rules = [
            Rule(r"model_b2\.([0-4])\.conv\.(.+)", r"links.sources.\1.conv.\2"),
            *_backbone(network, network.first, "model_b", "first."),
            *_backbone(network, network.second, "model_b2", "second."),
            *_head(network, "model_h", 0, "first.", anchors, implicit=implicit),
            *_head(network, "model_h2", 0, "second.", anchors, implicit=implicit),
            *_ROUTER,
        ]
    else:
        rules = [
            *_backbone(network, network.first, "model", ""),
            *_head(network, "model", network.layers, "", anchors, implicit=implicit),
        ]
    return Recipe(
        f"{'dy_' if dynamic else ''}{network.experiment}",
        rules,
        num_classes=shapes[f"{detect}.m.0.weight"][0] // anchors.shape[1] - 5,
        settings=settings,
        options=["+router=exact"] if has(shapes, r"router\.") else [],
        remarks=_remarks(source, network, anchors) if dynamic else [_YOLOV7_TERMS],
    )


def _network(source: Source, prefix: str, dynamic: bool) -> tuple[Network, str]:
    """Which one, and the name of its detection layer."""
    names = (re.fullmatch(rf"({prefix}\.(\d+))\.m\.0\.weight", name) for name in source.weights)
    match = next(filter(None, names), None)
    if match is None:
        raise UserError(f"{source.path} has no detection layer under {prefix}: is it whole?")
    known = {network.head.detect + (0 if dynamic else network.layers): network for network in NETWORKS}
    if int(match[2]) not in known:
        kind = "detector of DynamicDet" if dynamic else "YOLOv7, -X or -W6 without auxiliary heads"
        raise UserError(
            f"{source.path} is no {kind}: its detection layer is {match[1]}, theirs are {', '.join(map(str, known))}"
        )
    return known[int(match[2])], match[1]


def _remarks(source: Source, network: Network, anchors: Tensor) -> list[str]:
    remarks = [_DYNAMICDET_TERMS]
    if not torch.equal(_anchors(source, f"model_h.{network.head.detect}"), anchors):
        remarks.append("the heads have other anchors: the first gets those of the second, with which it was trained")
    return remarks


def _anchors(source: Source, detect: str) -> Tensor:
    """(L, A, 2) float32 in pixels.

    Raises:
        UserError: if the file's two accounts of them differ.
    """
    grid, pixels = (source.weights[f"{detect}.{name}"].float() for name in ("anchors", "anchor_grid"))
    pixels = anchor_pairs(pixels)
    strides = 8 * 2.0 ** torch.arange(len(pixels)).view(-1, 1, 1)
    if grid.shape != pixels.shape or not torch.allclose(grid * strides, pixels, rtol=2e-3):  # half precision
        raise UserError(f"{source.path} holds two sets of anchors for {detect} that differ: anchors and anchor_grid")
    return pixels


def _backbone(network: Network, numbers: Backbone, prefix: str, part: str) -> Iterator[Rule]:
    *stem, last = numbers.stem
    for i, number in enumerate(stem):
        yield from _conv(rf"{prefix}\.{number}", f"{part}backbone.enters.0.{i}")
    yield from _conv(rf"{prefix}\.{last}", f"{part}backbone.bodies.0")
    for stage, (enter, body) in enumerate(zip(numbers.enters, numbers.bodies, strict=True), 1):
        yield from _entrance(prefix, enter, f"{part}backbone.enters.{stage}", pool=network.pool and stage > 1)
        yield from _elan(prefix, body, f"{part}backbone.bodies.{stage}", network.chain)


def _head(network: Network, prefix: str, shift: int, part: str, anchors: Tensor, *, implicit: bool) -> Iterator[Rule]:
    head = network.head
    for number, name in _SPP.items():
        yield from _conv(rf"{prefix}\.{shift}\.cv{number}", f"{part}neck.spp.{name}")
    for name in ("narrow", "laterals", "outputs"):
        for level, number in enumerate(getattr(head, name)):
            yield from _conv(rf"{prefix}\.{shift + number}", f"{part}neck.{name}.{level}")
    for name in ("top_down", "bottom_up"):
        for level, number in enumerate(getattr(head, name)):
            yield from _elan(prefix, shift + number, f"{part}neck.{name}.{level}", network.chain)
    for level, number in enumerate(head.down):
        yield from _entrance(prefix, shift + number, f"{part}neck.down.{level}", pool=network.pool)
    for level, number in enumerate(head.outputs):
        for theirs, ours in _REP.items():
            yield Rule(rf"{prefix}\.{shift + number}\.{theirs}\.(.+)", rf"{part}neck.outputs.{level}.{ours}.\1")
    detect = rf"{prefix}\.{shift + head.detect}\."
    convs = rf"{part}predictor.convs.\1."
    yield Rule(detect + r"m\.(\d)\.(.+)", convs + (r"conv.\2" if implicit else r"\2"))
    yield Rule(detect + r"ia\.(\d)\.implicit", convs + "add", without_batch)
    yield Rule(detect + r"im\.(\d)\.implicit", convs + "scale", without_batch)
    yield Rule(detect + "anchor_grid", f"{part}predictor.anchors", lambda _: anchors)
    yield drop(detect + "anchors", "the same in units of the stride")


def _conv(layer: str, target: str) -> Iterator[Rule]:
    yield Rule(rf"{layer}\.conv\.weight", f"{target}.conv.weight")
    yield Rule(rf"{layer}\.bn\.(.+)", rf"{target}.norm.\1")


def _elan(prefix: str, start: int, target: str, chain: int) -> Iterator[Rule]:
    for i, name in enumerate(("first", "second", *(f"chain.{link}" for link in range(chain)))):
        yield from _conv(rf"{prefix}\.{start + i}", f"{target}.{name}")
    yield from _conv(rf"{prefix}\.{start + chain + 3}", f"{target}.out")


def _entrance(prefix: str, start: int, target: str, *, pool: bool) -> Iterator[Rule]:
    for i, name in enumerate(("pooled", "before", "strided") if pool else ("",)):
        yield from _conv(rf"{prefix}\.{start + i}", f"{target}.{name}".rstrip("."))
