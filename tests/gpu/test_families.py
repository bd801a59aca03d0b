"""Every family trains, detects and is validated on a device, in every precision; on a GPU its head waits for nothing.

The same steps run on the CPU everywhere, so that they are right on the day a GPU is at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from dyndet import build_detector
from dyndet.lightning.detection import DetectionModule
from dyndet.models.detectors.base import Detector
from dyndet.models.detectors.pyramid import PyramidDetector
from dyndet.structures import Batch, Category, ImageBatch, Target

SMALL = ["data.size=64", "neck.channels=16"]
FAMILIES = {
    "fine-grained": ("shapes_dyn", [*SMALL, "head.depth=1", "head.norm_groups=4"]),
    "dyhead": ("shapes_dyn", [*SMALL, "head=dyhead_small", "head.gn_groups=4"]),
    "dynamicdet": ("shapes_dy_tiny", []),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def a_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (2, 3, 64, 96), generator=generator, dtype=torch.uint8)
    sizes = torch.tensor([[64, 96], [56, 80]])
    boxes = torch.tensor([[8.0, 8, 40, 40], [30, 10, 70, 50]])
    targets = [
        Target(boxes, torch.tensor([0, 1]), torch.zeros(2, dtype=torch.bool), image_id=number, original_size=size)
        for number, size in enumerate([(64, 96), (56, 80)])
    ]
    return Batch(ImageBatch(pixels, sizes, sizes), targets)


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """On a GPU any wait of the host is an error."""
    if device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def parts_with_heads(detector: Detector) -> list[PyramidDetector]:
    return [part for part in detector.modules() if isinstance(part, PyramidDetector)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("device", DEVICES)
def test_train_detect_validate(device: str, family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    experiment, overrides = FAMILIES[family]
    detector = build_detector(experiment, overrides).to(device)
    batch = a_batch().to(device)
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-3)
    half = dtype != torch.float32
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    with torch.autocast(device, dtype=dtype if half else None, enabled=half):
        losses = detector.train().losses(batch.images, batch.targets)
    assert all(value.isfinite() and value.dtype == torch.float32 for value in losses.terms.values())
    scaler.scale(losses.total).backward()
    assert all(p.grad is not None for p in detector.parameters() if p.requires_grad)
    scaler.step(optimizer)
    scaler.update()

    module = DetectionModule(detector.eval(), categories=[Category(i, str(i)) for i in range(4)])
    with torch.inference_mode(), torch.autocast(device, dtype=dtype if half else None, enabled=half):
        found = module.validation_step(batch, 0)
    assert isinstance(found, dict) and len(found["detections"]) == 2
    assert module.compute.compute().total.min > 0
    assert 0 <= module.ap.compute()["AP"] <= 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("device", DEVICES)
def test_the_head_waits_for_nothing(device: str, family: str) -> None:
    experiment, overrides = FAMILIES[family]
    detector = build_detector(experiment, overrides).to(device).train()
    batch = a_batch().to(device)
    for part in parts_with_heads(detector):
        features, valid = part.pyramid(batch.images)
        part.run_head(features, valid)  # makes index tables
        with no_waiting(device):
            output = part.run_head(features, valid)
            loss = torch.stack([x.square().mean() for x in output.cls + output.reg]).sum()
            if output.routing is not None:
                loss = loss + (output.routing.soft() / output.routing.full()).mean()
            loss.backward()
        assert loss.isfinite()
