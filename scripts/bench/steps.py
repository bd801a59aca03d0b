"""Whole training steps and inferences of an experiment, with the fine-grained or the fixed head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dyndet.models.detectors.base import Detector

from .masks import ForcedGates, masks


class OpenBlobs:
    """A gate activation that opens blobs of a density, whatever the pyramid."""

    joint = False

    def __init__(self, density: float) -> None:
        self.density = density
        self.forced: dict[Any, ForcedGates] = {}

    def __call__(self, logits: Tensor, layout: Any) -> Tensor:
        key = layout.shapes, layout.batch
        if key not in self.forced:
            maps = masks("blob", self.density, layout.shapes, layout.batch)
            self.forced[key] = ForcedGates(torch.cat([mask.flatten() for mask in maps]))  # of any checkout's layout
        return self.forced[key](logits, layout)


def detector_of(experiment: str, density: float | None) -> Detector:
    """With random weights, its gates open at this share of the positions; None takes the small fixed head."""
    from dyndet import build_detector  # needs Hydra, which the other modes do without

    torch.manual_seed(0)
    detector = build_detector(experiment, ["head=fixed_small"] if density is None else [])
    nn.Module.to(detector, memory_format=torch.channels_last)
    for module in detector.modules():
        if density is not None and hasattr(module, "activation") and hasattr(module, "gates"):
            del module.activation  # that one is a module, this is none
            object.__setattr__(module, "activation", OpenBlobs(density))
    return detector


def training_step(detector: Detector, batch: int, size: tuple[int, int]) -> Callable[[], object]:
    """Losses of random images and boxes with the cost of the routing, the backward pass and the optimiser's step."""
    height, width = size
    generator = torch.Generator().manual_seed(0)
    images = list(torch.rand(batch, 3, height, width, generator=generator))
    corners = torch.rand(batch, 8, 2, generator=generator) * torch.tensor([width, height]) * 0.7
    boxes = torch.cat([corners, corners + 20 + torch.rand(batch, 8, 2, generator=generator) * 60], 2)
    targets: list[Any] = [{"boxes": box, "labels": torch.zeros(8, dtype=torch.long)} for box in boxes]
    detector.train()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-5)

    def step() -> None:
        losses = detector.losses(images, targets)
        total, routing = losses.total, losses.routing
        if routing is not None:
            total = total + 0.03 * (routing.soft() / routing.full()).mean()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()

    return step


def inference(detector: Detector, size: tuple[int, int]) -> Callable[[], object]:
    """Detections of one random image."""
    images = list(torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)))
    return lambda: detector.detect(images)
