"""Losses of every image by itself, for every dense predictor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from anchor_oracles import SHAPES, STRIDES, random_maps, target_of
from torch import Tensor
from yolo_oracles import ANCHORS

from dyndet.models.detectors.pyramid import Outputs
from dyndet.models.predictors.atss import ATSS
from dyndet.models.predictors.fcos import FCOS
from dyndet.models.predictors.freeanchor import FreeAnchor
from dyndet.models.predictors.normalise import Normaliser
from dyndet.models.predictors.retinanet import RetinaNet
from dyndet.models.predictors.yolo_predictor import YoloPredictor
from dyndet.ops.grid import valid_masks
from dyndet.structures import HeadOutput, ImageBatch, Target

Dense = ATSS | RetinaNet | FreeAnchor | FCOS | YoloPredictor
CLASSES = 2
VARIANTS: dict[str, Callable[[], Dense]] = {
    "fcos": lambda: FCOS(4, STRIDES, num_classes=CLASSES),
    "atss": lambda: ATSS(4, STRIDES, num_classes=CLASSES, scale=4.0),
    "retinanet": lambda: RetinaNet(4, STRIDES, num_classes=CLASSES, normaliser=Normaliser("ema")),
    "freeanchor": lambda: FreeAnchor(4, STRIDES, num_classes=CLASSES, bag_size=20),
    "yolo": lambda: YoloPredictor(4, STRIDES, num_classes=CLASSES, anchors=ANCHORS[:2], balance=[1.0, 0.5]),
}
EVERY = pytest.mark.parametrize("name", VARIANTS)
TARGETS = [
    target_of([[3.1, 4.2, 30.3, 30.4], [10.2, 10.6, 31.1, 28.8]], [1, 0]),
    target_of([]),
    target_of([[2.0, 3.0, 20.0, 22.0]], [0]),
]


def maps(module: Dense, batch: int = 3) -> list[dict[str, Tensor]]:
    if isinstance(module, YoloPredictor):
        generator = torch.Generator().manual_seed(0)
        return [{"pred": torch.randn(batch, 3, *s, 5 + CLASSES, generator=generator).requires_grad_()} for s in SHAPES]
    per_position = 1 if isinstance(module, FCOS) else module.anchors.per_position
    names = ["cls", "box", "centerness"] if isinstance(module, (ATSS, FCOS)) else ["cls", "box"]
    return [{n: level[n] for n in names} for level in random_maps(batch, CLASSES, per_position)]


def build(name: str) -> Dense:
    torch.manual_seed(0)
    return VARIANTS[name]().eval()


def image_losses(
    module: Dense, raw: list[dict[str, Tensor]], targets: list[Target], valid: list[Tensor] | None = None
) -> Tensor:
    """As a `DenseDetector` takes them, of maps that are given."""
    outputs = Outputs(ImageBatch.of(torch.zeros(len(targets), 3, 1, 1)), targets, valid, HeadOutput([], []), raw)
    each = [outputs.only(index) for index in range(len(targets))]
    terms = [module.losses(alone.raw, alone.targets, alone.valid) for alone in each]
    return torch.stack([torch.stack(list(losses.values())).sum() for losses in terms])


@EVERY
def test_a_single_image_has_the_losses_of_its_batch(name: str) -> None:
    module = build(name)
    raw = maps(module, 1)
    valid = valid_masks(torch.tensor([[32, 40]]), SHAPES, STRIDES)
    for masks in (None, valid):
        total = torch.stack(list(module.losses(raw, TARGETS[:1], masks).values())).sum()
        found = image_losses(module, raw, TARGETS[:1], masks)
        assert found.shape == (1,) and found.dtype == torch.float32
        assert found.item() == total.item() > 0


@EVERY
def test_images_keep_their_losses_in_any_company(name: str) -> None:
    module = build(name)
    raw = maps(module)
    valid = valid_masks(torch.tensor([[48, 56], [33, 20], [32, 40]]), SHAPES, STRIDES)
    found = image_losses(module, raw, TARGETS, valid)
    order = [2, 0, 1]
    turned = [{key: value[order] for key, value in level.items()} for level in raw]
    masks = None if valid is None else [mask[order] for mask in valid]
    assert torch.equal(image_losses(module, turned, [TARGETS[index] for index in order], masks), found[order])
    assert len(set(found.tolist())) == 3


@EVERY
def test_each_image_trains_its_own_maps(name: str) -> None:
    module = build(name)
    raw = maps(module)
    image_losses(module, raw, TARGETS)[2].backward()
    for level in raw:
        for value in level.values():
            assert value.grad is not None and not value.grad[:2].any()
    assert any(value.grad[2].any() for level in raw for value in level.values() if value.grad is not None)


def test_means_are_inside_the_image() -> None:
    """Over the batch the image with more objects has more say; the published factor of the batch size is 1 here."""
    module = build("yolo")
    raw = maps(module)
    each = image_losses(module, raw, TARGETS)
    batch = torch.stack(list(module.losses(raw, TARGETS).values())).sum()
    assert each.sum().item() != pytest.approx(batch.item(), rel=1e-3)
    same = [{"pred": level["pred"][:1].expand(3, -1, -1, -1, -1)} for level in raw]
    batch = torch.stack(list(module.losses(same, TARGETS[:1] * 3).values())).sum()
    assert image_losses(module, same, TARGETS[:1] * 3).sum().item() == pytest.approx(batch.item(), rel=1e-5)


@EVERY
def test_shares_of_positive_positions_are_those_that_learn_boxes(name: str) -> None:
    """Where an object is answered for, and nowhere else, box maps have a gradient."""
    module = build(name)
    raw = maps(module)
    for level in raw:  # all distances of FCOS pass its ReLU
        for value in level.values():
            value.data.abs_()
    valid = valid_masks(torch.tensor([[48, 56], [33, 20], [32, 40]]), SHAPES, STRIDES)
    assert valid is not None
    for masks in (None, valid):
        for level in raw:
            for value in level.values():
                value.grad = None
        image_losses(module, raw, TARGETS, masks).sum().backward()
        expected = []
        for index, level in enumerate(raw):
            gradient = level["pred" if name == "yolo" else "box"].grad
            assert gradient is not None
            moved = gradient[..., :4].ne(0).any(-1).any(1) if name == "yolo" else gradient.ne(0).any(1)
            area = torch.ones_like(moved) if masks is None else masks[index][:, 0]
            assert not (moved & ~area).any()
            expected.append(float(moved.sum() / area.sum()))
        assert sum(expected) > 0
        assert module.positive_shares(raw, TARGETS, masks).tolist() == pytest.approx(expected)
