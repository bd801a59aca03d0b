"""What all dense predictors must stand: extreme logits, empty images, low precision, padding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from anchor_oracles import HEIGHT, SHAPES, STRIDES, WIDTH, random_maps, target_of
from torch import Tensor

from dyndet.models.predictors.anchors import AnchorGrid, BoxCoder
from dyndet.models.predictors.atss import ATSS
from dyndet.models.predictors.fcos import FCOS
from dyndet.models.predictors.fcos_assign import CenterSampling
from dyndet.models.predictors.freeanchor import FreeAnchor
from dyndet.models.predictors.normalise import Normaliser
from dyndet.models.predictors.postprocess import Postprocess
from dyndet.models.predictors.retinanet import RetinaNet
from dyndet.ops.grid import valid_masks
from dyndet.structures import HeadOutput, ImageBatch, Target

Predictor = ATSS | RetinaNet | FreeAnchor | FCOS
CLASSES = 2
PLAIN_FCOS = {"centerness_on": "cls", "box_activation": "exp", "score": "product"}

VARIANTS: dict[str, Callable[..., Predictor]] = {
    "atss": lambda **kw: ATSS(4, STRIDES, num_classes=CLASSES, scale=4.0, **kw),
    "atss_official": lambda **kw: ATSS(
        4, STRIDES, num_classes=CLASSES, scale=4.0, center_offset=0.5, kernel=1, box_normaliser_min=0.0,
        normaliser=Normaliser("total"), postprocess=Postprocess(rank="score", clip="after"), **kw,
    ),
    "retinanet": lambda **kw: RetinaNet(4, STRIDES, num_classes=CLASSES, **kw),
    "retinanet_detectron2": lambda **kw: RetinaNet(
        4, STRIDES, num_classes=CLASSES, anchors=AnchorGrid.octaves(order="ratio"), coder=BoxCoder(clamp="upper"),
        normaliser=Normaliser("ema"), beta=0.1, **kw,
    ),
    "retinanet_torchvision": lambda **kw: RetinaNet(
        4, STRIDES, num_classes=CLASSES, normaliser=Normaliser("per_image"), **kw
    ),
    "freeanchor": lambda **kw: FreeAnchor(4, STRIDES, num_classes=CLASSES, bag_size=200, **kw),
    "fcos": lambda **kw: FCOS(4, STRIDES, num_classes=CLASSES, assigner=CenterSampling(base_range=24), **kw),
    "fcos_plain": lambda **kw: FCOS(
        4, STRIDES, num_classes=CLASSES, assigner=CenterSampling(radius=None, base_range=24), box_loss="iou",
        **PLAIN_FCOS, **kw,
    ),
    "fcos_exp_giou": lambda **kw: FCOS(
        4, STRIDES, num_classes=CLASSES, assigner=CenterSampling(base_range=24), **PLAIN_FCOS, **kw
    ),
    "fcos_detectron2": lambda **kw: FCOS(
        4, STRIDES, num_classes=CLASSES, assigner=CenterSampling(base_range=24, strict=True), level_scales=False,
        box_weighting="uniform", point_offset=0.5, normaliser=Normaliser("ema", start=300.0), **kw,
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", VARIANTS)

BUSY = [
    target_of([[3.1, 4.2, 33.3, 38.4], [20.2, 10.6, 52.1, 40.8], [20.2, 10.6, 52.1, 40.8]], [1, 0, 1]),
    target_of([[10.0, 10.0, 11.0, 11.0], [0.0, 0.0, WIDTH, HEIGHT]], [0, 1]),
    target_of([]),
]


def build(name: str, **kwargs: object) -> Predictor:
    torch.manual_seed(0)
    return VARIANTS[name](**kwargs)


def maps(module: Predictor, batch: int = 3, seed: int = 0) -> list[dict[str, Tensor]]:
    per_position = 1 if isinstance(module, FCOS) else module.anchors.per_position
    names = ["cls", "box", "centerness"] if isinstance(module, (ATSS, FCOS)) else ["cls", "box"]
    return [{n: level[n] for n in names} for level in random_maps(batch, CLASSES, per_position, seed=seed)]


def check_gradients(losses: dict[str, Tensor], raw: list[dict[str, Tensor]]) -> None:
    assert all(value.isfinite() and value.dtype == torch.float32 for value in losses.values()), losses
    torch.stack(list(losses.values())).sum().backward()
    for index, level in enumerate(raw):
        for name, value in level.items():
            assert value.grad is not None, f"level {index} {name}"  # processes that share gradients need all of them
            assert value.grad.isfinite().all(), f"level {index} {name}"


@EVERY
@pytest.mark.parametrize("cls", [80.0, -80.0, None])
@pytest.mark.parametrize("box", [80.0, -80.0, None])
def test_extreme_logits_have_finite_gradients(name: str, cls: float | None, box: float | None) -> None:
    """80, -80, or either at random."""
    module = build(name)
    raw = maps(module)
    with torch.no_grad():
        for level in raw:
            for key, value in level.items():
                wanted = box if key == "box" else cls
                value.copy_(80 * value.sign() if wanted is None else torch.full_like(value, wanted))
    check_gradients(module.losses(raw, BUSY), raw)


@EVERY
def test_logits_and_boxes_at_zero_have_finite_gradients(name: str) -> None:
    module = build(name)
    raw = maps(module)
    with torch.no_grad():
        for level in raw:
            for value in level.values():
                value.zero_()
    check_gradients(module.losses(raw, BUSY), raw)


@EVERY
@pytest.mark.parametrize("padded", [False, True])
def test_images_without_objects(name: str, padded: bool) -> None:
    module = build(name)
    raw = maps(module)
    valid = valid_masks(torch.tensor([[HEIGHT, WIDTH], [16, 24], [1, 1]]), SHAPES, STRIDES) if padded else None
    losses = module.losses(raw, [target_of([])] * 3, valid)
    background = "negative" if name == "freeanchor" else "cls"
    assert losses[background].item() > 0
    assert all(value.item() == 0 for key, value in losses.items() if key != background)
    check_gradients(losses, raw)


@EVERY
def test_boxes_without_area_and_of_one_pixel(name: str) -> None:
    module = build(name)
    raw = maps(module)
    targets = [
        target_of([[10.0, 10.0, 11.0, 11.0]]),
        target_of([[20.0, 20.0, 20.0, 20.0]]),
        target_of([[0.0, 0.0, 30.0, 0.0]]),
    ]
    check_gradients(module.losses(raw, targets), raw)


@EVERY
def test_losses_are_float32_under_autocast(name: str) -> None:
    """The maps are bfloat16, the losses are those that the same maps have without autocast."""
    module = build(name).eval()  # a moving average stays
    generator = torch.Generator().manual_seed(1)
    features = [torch.randn(3, 4, *shape, generator=generator) * 30 for shape in SHAPES]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        raw = module(HeadOutput(features, features))
        assert all(value.dtype == torch.bfloat16 for level in raw for key, value in level.items() if key != "box")
        losses = module.losses(raw, BUSY)
    exact = module.losses([{key: value.float() for key, value in level.items()} for level in raw], BUSY)
    for key, value in losses.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact[key].item(), rel=1e-6)
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@EVERY
def test_detections_under_autocast(name: str) -> None:
    module = build(name, postprocess=Postprocess(score_threshold=0.3)) if name != "atss_official" else build(name)
    raw = [{key: value.detach().to(torch.bfloat16) for key, value in level.items()} for level in maps(module, 1)]
    sizes = torch.tensor([[HEIGHT, WIDTH]])
    images = ImageBatch(torch.zeros(1, 3, HEIGHT, WIDTH), sizes, sizes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (mixed,) = module.detections(raw, images)
    (exact,) = module.detections([{k: v.float() for k, v in level.items()} for level in raw], images)
    assert len(exact) > 3 and mixed.boxes.dtype == torch.float32
    assert torch.equal(mixed.boxes, exact.boxes) and torch.equal(mixed.scores, exact.scores)


SMALL = (32, 32)
WITHIN = [target_of([[3.1, 4.2, 26.3, 30.4], [8.2, 1.6, 31.1, 17.8]], [1, 0]), target_of([[5.0, 6.0, 6.0, 7.0]], [1])]


def cropped(raw: list[dict[str, Tensor]], size: tuple[int, int]) -> list[dict[str, Tensor]]:
    return [
        {key: value[:, :, : size[0] // stride, : size[1] // stride] for key, value in level.items()}
        for level, stride in zip(raw, STRIDES, strict=True)
    ]


@EVERY
@pytest.mark.parametrize("size", [(32, 32), (16, 16)])
@pytest.mark.parametrize("seed", [0, 1])
def test_padding_does_not_train(name: str, size: tuple[int, int], seed: int) -> None:
    """A batch with padding has the losses of the same maps without it, whatever stands on the padding."""
    module = build(name).eval()
    raw = maps(module, 2, seed)
    inside = cropped(raw, size)
    targets = [Target(t.boxes * size[0] / 32, t.labels, t.crowd) for t in WITHIN]
    alone = module.losses(inside, targets)
    valid = valid_masks(torch.tensor([size] * 2), SHAPES, STRIDES)
    assert valid is not None
    padded = module.losses(raw, targets, valid)
    for key, value in padded.items():
        assert value.item() == pytest.approx(alone[key].item(), rel=1e-5), key
    torch.stack(list(padded.values())).sum().backward()
    for level, mask in zip(raw, valid, strict=True):
        for key, value in level.items():
            assert value.grad is not None and not (value.grad * ~mask).any(), key


@EVERY
def test_padding_trains_where_it_is_not_ignored(name: str) -> None:
    module = build(name, ignore_padding=False).eval()
    raw = maps(module, 2)
    valid = valid_masks(torch.tensor([SMALL] * 2), SHAPES, STRIDES)
    with_masks, without = module.losses(raw, WITHIN, valid), module.losses(raw, WITHIN)
    assert {k: v.item() for k, v in with_masks.items()} == {k: v.item() for k, v in without.items()}
    background = "negative" if name == "freeanchor" else "cls"
    assert with_masks[background].item() > 1.05 * module.losses(cropped(raw, SMALL), WITHIN)[background].item()


@pytest.mark.parametrize("name", ["atss", "retinanet"])
def test_anchors_beyond_the_own_padded_size_do_not_train(name: str) -> None:
    """The image of 10 x 20 counts as 16 x 32 (divisor 16), or as 32 x 32 (divisor 32), in a batch of 48 x 56."""
    for divisor, size in ((16, (16, 32)), (32, (32, 32))):
        module = build(name, ignore_padding=False, valid_divisor=divisor)
        raw = maps(module, 1)
        target = [target_of([[2.0, 1.0, 18.0, 9.5]])]
        valid = valid_masks(torch.tensor([[10, 20]]), SHAPES, STRIDES)
        found = module.losses(raw, target, valid)
        alone = build(name).losses(cropped(raw, size), target)
        assert {k: v.item() for k, v in found.items()} == pytest.approx(
            {k: v.item() for k, v in alone.items()}, rel=1e-5
        )


@EVERY
def test_padding_does_not_detect(name: str) -> None:
    module = build(name)
    raw = [{key: value.detach() for key, value in level.items()} for level in maps(module, 1)]
    sizes = torch.tensor([SMALL])
    valid = valid_masks(sizes, SHAPES, STRIDES)
    (padded,) = module.detections(raw, ImageBatch(torch.zeros(1, 3, HEIGHT, WIDTH), sizes, sizes), valid)
    (alone,) = module.detections(cropped(raw, SMALL), ImageBatch(torch.zeros(1, 3, *SMALL), sizes, sizes))
    assert len(alone) > 3
    assert torch.equal(padded.labels, alone.labels)
    assert torch.allclose(padded.boxes, alone.boxes, atol=1e-4) and torch.allclose(padded.scores, alone.scores)


@EVERY
def test_images_of_a_batch_do_not_mix(name: str) -> None:
    """Every image's detections are its own; losses do not depend on the order of images."""
    module = build(name).eval()
    raw = maps(module)
    turned = [{key: value.roll(1, 0) for key, value in level.items()} for level in raw]
    losses, other = module.losses(raw, BUSY), module.losses(turned, BUSY[-1:] + BUSY[:-1])
    assert {k: v.item() for k, v in other.items()} == pytest.approx({k: v.item() for k, v in losses.items()}, rel=1e-5)


def test_the_average_is_part_of_a_predictor_checkpoint() -> None:
    module = build("retinanet_detectron2")
    module.losses(maps(module), BUSY)
    state = module.state_dict()
    assert state["normaliser.average"].item() != 100
    fresh = build("retinanet_detectron2")
    fresh.load_state_dict(state)
    assert fresh.normaliser.average.item() == state["normaliser.average"].item()  # type: ignore[union-attr]
    assert not [key for key in build("retinanet").state_dict() if key.startswith("normaliser")]
