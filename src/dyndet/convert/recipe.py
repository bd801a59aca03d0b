"""What the modules of the sources say about a release."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dyndet.convert.engine import Fill, Rule, drop

Shapes = Mapping[str, tuple[int, ...]]

CAFFE = {
    "preprocess.mean": [103.53 / 255, 116.28 / 255, 123.675 / 255],
    "preprocess.std": [1 / 255] * 3,
    "preprocess.bgr": True,
}
"""Blue first, mean colour only: what the MSRA/Caffe ResNets were trained with."""

COUNTERS = drop(r".*\.num_batches_tracked", "a counter that frozen norms do not need")
FILLS = (
    Fill(r".*\.num_batches_tracked", 0, "a counter that frozen norms do not have"),
    Fill(r"predictor\.normaliser\.average", 100.0, "a running count of training; starts anew"),
)


@dataclass(frozen=True)
class Recipe:
    """An experiment for a release, and how its tensors get there.

    Attributes:
        experiment: the name.
        settings: keys of its configuration that the release sets otherwise.
        rules: see `engine.Rule`.
        num_classes: K.
        names: of the classes, where the file has them.
        note: what no tensor tells and the user may have to.
        options: Hydra overrides that add parts which the experiment leaves out.
        remarks: what the user should know in any case.
    """

    experiment: str
    rules: Sequence[Rule]
    num_classes: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    names: list[str] | None = None
    note: str = ""
    options: Sequence[str] = ()
    remarks: Sequence[str] = ()


def count(shapes: Shapes, pattern: str) -> int:
    """How many different values the first group of a pattern takes."""
    return len({match.group(1) for name in shapes if (match := re.match(pattern, name))})


def has(shapes: Shapes, pattern: str) -> bool:
    """Whether any name starts with a pattern."""
    return any(re.match(pattern, name) for name in shapes)


def resnet_name(shapes: Shapes, third_stage: str, grouped: str) -> str | None:
    """Timm's name of a bottleneck ResNet or ResNeXt.

    Args:
        shapes: of all tensors.
        third_stage: pattern whose first group numbers the blocks of the third of four stages.
        grouped: name of a first-stage block's 3x3 weight.
    """
    depth = {6: 50, 23: 101, 36: 152}.get(count(shapes, third_stage))
    if depth is None or grouped not in shapes:
        return None
    out_channels, width = shapes[grouped][:2]
    groups = out_channels // width
    return f"resnet{depth}" if groups == 1 else f"resnext{depth}_{groups}x{width}d"
