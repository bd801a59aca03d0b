"""A dynamic head from outside of the package: what it offers is asked for, never its class."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

import dyndet
from dyndet.calibrate import calibrate
from dyndet.cli.compose import build, compose_command, compose_experiment
from dyndet.errors import UserError
from dyndet.evaluate import evaluate
from dyndet.models.detectors.base import GatedHead, SwitchableHead
from dyndet.models.detectors.pyramid import PyramidDetector
from dyndet.ops.sparse import Impl
from dyndet.report.gate_maps import draw_gates
from dyndet.routing import GatedPath, LayerCost, Routing
from dyndet.speeds.timing import time_head
from dyndet.structures import Batch, HeadOutput, ImageBatch


class Gated(nn.Module):
    """A residual 1x1 convolution behind a gate."""

    gate_threshold = 0.0

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, 1, 1)
        self.path = GatedPath("both.0", "depth", (LayerCost(channels**2),), router_macs=channels)

    def forward(self, features: Sequence[Tensor], valid: Sequence[Tensor] | None = None) -> HeadOutput:
        gates = [self.gate(x).sigmoid() for x in features]
        gates = [gate * (gate > self.gate_threshold) for gate in gates]
        maps = [x + gate * self.conv(x) for x, gate in zip(features, gates, strict=True)]
        return HeadOutput(maps, maps, Routing.of([self.path], gates, valid))

    def close_below(self, threshold: float) -> None:
        self.gate_threshold = threshold


class Twinned(Gated):
    """It also has executions, and a twin."""

    impl: Impl = "auto"

    def execute(self, impl: Impl) -> Impl:
        before, self.impl = self.impl, impl
        return before

    def fixed_twin(self) -> nn.Module:
        return copy.deepcopy(self).eval()


OWN = ["head=none", "data.size=64", "data.train_images=4", "data.val_images=2", "data.batch_size=2"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of a detector with this head, as it starts."""
    torch.manual_seed(0)
    config = compose_experiment("shapes_dyn", OWN)
    config.head._target_ = f"{__name__}.Twinned"
    detector = build(config.detector)
    data = build(config.data.module)
    data.setup("validate")
    weights = {f"detector.{name}": value for name, value in detector.state_dict().items()}
    stored = {
        "config": OmegaConf.to_container(config),
        "categories": [{"id": category.id, "name": category.name} for category in data.categories],
    }
    torch.save({"state_dict": weights, "dyndet": stored}, tmp_path / "own.ckpt")
    return tmp_path / "own.ckpt"


def test_a_head_of_ones_own_has_every_command(checkpoint: Path, tmp_path: Path) -> None:
    keys = [f"ckpt={checkpoint}", f"output_dir={tmp_path}", "trust=true"]
    found = calibrate(compose_command("calibrate", [*keys, "device=cpu", "latency_images=1", "thresholds=[0,0.5,1]"]))
    assert [point.threshold for point in found.points] == [1.0, 0.5, 0.0]
    cheapest, _, dearest = found.points
    assert cheapest.macs < dearest.macs and cheapest.latency_ms and dearest.latency_ms

    detector = dyndet.load_detector(checkpoint, speed="easy", impl="gather", trust=True)
    assert isinstance(detector, PyramidDetector)
    head: Any = detector.head
    assert isinstance(head, GatedHead) and isinstance(head, SwitchableHead)
    assert head.gate_threshold == 1 and head.impl == "gather"
    image = torch.rand(3, 64, 64)
    _, routing = detector.detect_with_routing([image])
    assert isinstance(routing, Routing) and not routing.used().any()
    decided = head.conv.weight.numel() * routing.layout.positions
    assert dearest.macs - cheapest.macs == pytest.approx(decided)
    assert draw_gates(image, routing, 0, strides=detector.strides).width > 64

    metrics = evaluate(compose_command("evaluate", [*keys, "trainer.accelerator=cpu", "timing=1", "speed=hard"]))
    assert metrics["macs/total_mean"] == pytest.approx(dearest.macs) and metrics["time/head_ratio"] > 0


def test_only_what_a_head_offers_is_used() -> None:
    detector = dyndet.build_detector("shapes_dyn")
    assert isinstance(detector, PyramidDetector)
    batches = [Batch(ImageBatch.of(torch.rand(1, 3, 64, 64)), [])]
    width = detector.neck.channels
    assert isinstance(width, int)
    detector.head = Twinned(width)
    assert time_head(detector, batches, impl="gather", rounds=1).ratio > 0
    assert detector.head.impl == "auto"  # as it was
    detector.head = Gated(width)
    with pytest.raises(UserError, match="no fixed twin"):
        time_head(detector, batches, impl="auto")
