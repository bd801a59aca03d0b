"""R9: edges of what a detector can be given: nothing to find, gates all open or closed, extreme prices, odd sizes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from dyndet.cli.compose import build, compose_experiment
from dyndet.models.detectors.base import Detector
from dyndet.models.heads.gates import GateConv
from dyndet.ops.sparse.backend import SwitchableHead
from dyndet.structures import Target
from faults.row import Outcome, Row

HEADS = [
    "fine_grained_small", "fine_grained_small head.coarse=true", "dyhead_fine_grained_small", "dyhead_small",
    "plain_small",
]  # fmt: skip
PREDICTORS = ["fcos_small", "atss_small", "retinanet_small", "freeanchor_small", "yolo_p5_small"]
SMALL = ["neck.channels=16", "head.depth=1", "head.num_blocks=1", "head.num_convs=1", "head.towers.depth=1"]
GATES = {"as they are": None, "all closed": -30.0, "all open": 30.0}


@cache
def _composed(choice: str) -> str:
    config = compose_experiment(None, choice.split())
    for key, value in (item.split("=") for item in SMALL):
        if OmegaConf.select(config, key) is not None:
            OmegaConf.update(config, key, int(value))
    return OmegaConf.to_yaml(config.detector, resolve=True)


def detector(choice: str) -> Detector:
    """The default detector with some parts exchanged, small, from the same weights each time."""
    torch.manual_seed(0)
    return build(OmegaConf.create(_composed(choice)))


def gates_at(model: Detector, bias: float | None) -> None:
    """Opens or closes every gate of a detector, wherever it looks."""
    for part in model.modules():
        if isinstance(part, GateConv) and bias is not None:
            torch.nn.init.zeros_(part.conv.weight)
            torch.nn.init.constant_(part.conv.bias, bias)  # type: ignore[arg-type]


def objects(count: int, classes: int, side: int = 64) -> list[Target]:
    """Of two images, the second of which is empty."""
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.4, 0.3, 0.95, 0.9]])[:count] * side
    labels = torch.arange(count) % classes
    return [
        Target(boxes, labels, labels < 0),
        Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool)),
    ]


def trained(folder: Path) -> Iterator[Outcome]:
    """A step of training."""
    cases = [(head, predictor) for head in HEADS for predictor in PREDICTORS]
    for number, (head, predictor) in enumerate(cases):
        weights, classes = ("0.0", "0.05", "1e6"), (1, 4)
        for turn, (state, bias) in enumerate(GATES.items()):
            weight, count = weights[(number + turn) % 3], classes[(number // 2 + turn) % 2]
            choice = f"head={head} predictor={predictor} budget.weight={weight} data.num_classes={count}"
            for found in (2, 0):
                model = detector(choice).train()
                gates_at(model, bias)
                total = model.losses(torch.rand(2, 3, 64, 64), objects(found, count)).total
                total.backward()
                lost = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
                lost += [] if total.isfinite() else ["the loss"]
                gates = f"gates {state}, λ {weight}" if "fine" in head else "no gates"
                case = f"{head}, {predictor}: {gates}, {found} objects, {count} classes"
                yield Outcome(case, not lost, ", ".join(lost[:3]))


def levels(folder: Path) -> Iterator[Outcome]:
    """A pyramid of one level, and images as small as one level's stride."""
    for head in ("fine_grained_small", "dyhead_small", "plain_small"):
        for state, bias in GATES.items():
            choice = f"head={head} backbone.strides=[8] neck.extra_levels=0 predictor=fcos_small"
            model = detector(choice).train()
            gates_at(model, bias)
            total = model.losses(torch.rand(2, 3, 64, 64), objects(2, 4)).total
            total.backward()
            good = bool(total.isfinite()) and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
            yield Outcome(f"{head}: one level, gates {state}", good)


def sizes(folder: Path) -> Iterator[Outcome]:
    """Sparse against dense execution, sizes 1 to 65."""
    model = detector("head=fine_grained_small head.depth=1").eval()
    generator = torch.Generator().manual_seed(0)
    parts = [part for part in model.modules() if isinstance(part, GateConv)]
    for part in parts:
        torch.nn.init.normal_(part.conv.weight, std=0.3, generator=generator)
        torch.nn.init.constant_(part.conv.bias, -0.1)  # type: ignore[arg-type]
    heads = [part for part in model.modules() if isinstance(part, SwitchableHead)]
    for side in range(1, 66):
        image = torch.rand(1, 3, side, (side * 7) % 65 + 1, generator=generator)
        results: list[list[Tensor]] = []
        for impl in ("dense", "gather"):
            for head in heads:
                head.execute(impl)
            with torch.no_grad():
                features, valid = model.pyramid(image)  # type: ignore[operator]
                output = model.head(features, valid)  # type: ignore[operator]
            results.append([*output.cls, *output.reg])
        worst = max(
            float((a - b).norm() / a.norm().clamp(min=1e-6)) if a.numel() else 0.0
            for a, b in zip(*results, strict=True)
        )
        finite = all(bool(part.isfinite().all()) for part in results[1])
        said = f"differs by {worst:.1e}" if finite else "no numbers"
        yield Outcome(f"{side} x {image.shape[-1]}", finite and worst < 1e-5, said)


ROWS = [
    Row(
        "R9.1",
        "heads x predictors: gates all closed and all open, λ 0, 0.05 and 1e6, no object, one class",
        "finite loss and gradients",
        trained,
        60,
    ),
    Row("R9.2", "a pyramid of one level, gates all closed and all open", "finite loss and gradients", levels, 10),
    Row("R9.3", "images of sides 1 to 65", "finite, and sparse execution equals the dense one to 1e-5", sizes, 10),
]
