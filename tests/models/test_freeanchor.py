"""FreeAnchor: bags and background against loops in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from anchor_oracles import (
    HEIGHT,
    SHAPES,
    STRIDES,
    WIDTH,
    AmbiguousError,
    Scene,
    decode,
    encode,
    flags,
    grid_anchors,
    iou,
    random_maps,
    rows_of,
    scenes,
    sigmoid,
    smooth_l1,
    target_of,
)
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from dyndet.models.predictors import freeanchor
from dyndet.models.predictors.anchors import AnchorGrid
from dyndet.models.predictors.freeanchor import FreeAnchor
from dyndet.ops.grid import valid_masks
from dyndet.structures import ImageBatch

STD = (0.1, 0.1, 0.2, 0.2)
SIDES = [(4.0, 4.0), (6.0, 3.0)]
ANCHORS = [anchor for level in grid_anchors(SIDES, 0.0) for anchor in level]
EVERYWHERE = flags((HEIGHT, WIDTH), 2)


class Sides(AnchorGrid):
    """The shapes of `SIDES`."""

    @property
    def per_position(self) -> int:
        return len(SIDES)

    def shapes(self) -> Tensor:
        return torch.tensor(SIDES)


def predictor(classes: int = 2, **kwargs: Any) -> FreeAnchor:
    torch.manual_seed(0)
    return FreeAnchor(4, STRIDES, num_classes=classes, anchors=Sides([1.0]), **kwargs)  # type: ignore[arg-type]


def positive_loss(
    cls: Sequence[Sequence[float]],
    deltas: Sequence[Sequence[float]],
    box: Sequence[float],
    label: int,
    allowed: Sequence[bool],
    *,
    bag_size: int = 50,
    beta: float = 0.11,
    weight: float = 0.75,
    alpha: float = 0.5,
) -> float:
    """Of the bag of one box."""
    ranked = sorted(((iou(box, ANCHORS[index]), index) for index, may in enumerate(allowed) if may), reverse=True)
    if len(ranked) > bag_size and ranked[bag_size - 1][0] - ranked[bag_size][0] < 1e-5:
        raise AmbiguousError
    likely = []
    for _, index in ranked[:bag_size]:
        wanted = encode(ANCHORS[index], box, STD)
        away = sum(smooth_l1(a - b, beta) for a, b in zip(deltas[index], wanted, strict=True))
        likely.append(sigmoid(cls[index][label]) * math.exp(-weight * away))
    shares = [1 / max(1 - p, 1e-12) for p in likely]
    return -alpha * math.log(sum(w * p for w, p in zip(shares, likely, strict=True)) / sum(shares))


def negative_loss(
    cls: Sequence[Sequence[float]],
    deltas: Sequence[Sequence[float]],
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    allowed: Sequence[bool],
    *,
    threshold: float = 0.6,
    gamma: float = 2.0,
    alpha: float = 0.5,
) -> float:
    """Of the anchors of one image."""
    decoded = [decode(anchor, row, STD) for anchor, row in zip(ANCHORS, deltas, strict=True)]
    total = 0.0
    overlaps = [[iou(box, d) if may else 0.0 for d, may in zip(decoded, allowed, strict=True)] for box in boxes]
    for index, row in enumerate(cls):
        if not allowed[index]:
            continue
        for k, logit in enumerate(row):
            is_object = 0.0
            for overlap, label in zip(overlaps, labels, strict=True):
                if label == k and overlap[index] > threshold:
                    degree = (overlap[index] - threshold) / (max(overlap) - threshold)
                    is_object = max(is_object, min(max(degree, 0), 1))
            z = min(max(sigmoid(logit) * (1 - is_object), 1e-12), 1 - 1e-12)
            total += (1 - alpha) * z**gamma * -math.log(1 - z)
    return total


def expected_losses(
    scene: Scene, raw: Sequence[dict[str, Tensor]], trained: Sequence[Sequence[bool]], bag_size: int = 50
) -> dict[str, float]:
    positive = negative = 0.0
    for image, allowed in enumerate(trained):
        boxes, labels = scene.boxes(image), scene.labels(image)
        cls, deltas = rows_of(raw, "cls", image, scene.classes), rows_of(raw, "box", image, 4)
        for box, label in zip(boxes, labels, strict=True):
            positive += positive_loss(cls, deltas, box, label, allowed, bag_size=bag_size)
        negative += negative_loss(cls, deltas, boxes, labels, allowed)
    objects = sum(len(target.boxes) for target in scene.targets)
    return {"positive": positive / max(objects, 1), "negative": negative / max(objects * bag_size, 1)}


def plant(raw: Sequence[dict[str, Tensor]], scene: Scene) -> None:
    """Lets some anchors predict boxes close to the true ones, so that background is not just background."""
    generator = torch.Generator().manual_seed(scene.seed)
    anchors = torch.tensor(ANCHORS)
    with torch.no_grad():
        for image, target in enumerate(scene.targets):
            for box in target.boxes.tolist():
                for index in torch.randint(len(anchors), (6,), generator=generator).tolist():
                    noise = torch.randn(4, generator=generator) * 0.3
                    set_deltas(raw, image, index, torch.tensor(encode(ANCHORS[index], box, STD)) + noise)


def set_deltas(raw: Sequence[dict[str, Tensor]], image: int, index: int, deltas: Tensor) -> None:
    for level, (height, width) in zip(raw, SHAPES, strict=True):
        if index < height * width * len(SIDES):
            position, a = divmod(index, len(SIDES))
            level["box"].data[image, a * 4 : a * 4 + 4, position // width, position % width] = deltas
            return
        index -= height * width * len(SIDES)


@settings(max_examples=60, deadline=None)
@given(scenes(lattice=False), st.sampled_from([4, 1000]), st.booleans())
def test_losses(scene: Scene, bag_size: int, ignore: bool) -> None:
    module = predictor(scene.classes, bag_size=bag_size, ignore_padding=ignore)
    trained = [flags(size, 2) if ignore else EVERYWHERE for size in scene.sizes]
    raw = scene.raw(2)
    plant(raw, scene)
    try:
        expected = expected_losses(scene, raw, trained, bag_size)
    except AmbiguousError:
        reject()
    losses = module.losses(raw, scene.targets, scene.valid())
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        assert value.shape == () and value.dtype == torch.float32
        assert value.item() == pytest.approx(expected[name], rel=5e-4, abs=1e-6), name


def example() -> tuple[list[dict[str, Tensor]], Scene]:
    target = target_of([[3.1, 4.2, 36.3, 39.4], [10.6, 8.2, 52.1, 40.8], [4.1, 4.7, 37.1, 38.6]], [1, 0, 1])
    scene = Scene([(HEIGHT, WIDTH)], [target], 2, 3)
    raw = scene.raw(2)
    plant(raw, scene)
    return raw, scene


def test_the_constants() -> None:
    """Published: bag 50, threshold 0.6, alpha 0.5, gamma 2, beta 0.11, box weight 0.75; each has its own effect."""
    raw, scene = example()
    arguments = rows_of(raw, "cls", 0, 2), rows_of(raw, "box", 0, 4)
    boxes, labels = scene.boxes(0), scene.labels(0)

    def expected(bag: dict[str, float], background: dict[str, float], bag_size: int) -> dict[str, float]:
        bags = [
            positive_loss(*arguments, box, label, EVERYWHERE, bag_size=bag_size, **bag)
            for box, label in zip(boxes, labels, strict=True)
        ]
        other = negative_loss(*arguments, boxes, labels, EVERYWHERE, **background)
        return {"positive": sum(bags) / 3, "negative": other / (3 * bag_size)}

    seen = set()
    for kwargs, bag, background, bag_size in (
        ({}, {}, {}, 8),
        ({}, {}, {}, 3),
        ({"threshold": 0.3}, {}, {"threshold": 0.3}, 8),
        ({"alpha": 0.25}, {"alpha": 0.25}, {"alpha": 0.25}, 8),
        ({"gamma": 1.0}, {}, {"gamma": 1.0}, 8),
        ({"beta": 1.0}, {"beta": 1.0}, {}, 8),
        ({"box_weight": 0.25}, {"weight": 0.25}, {}, 8),
    ):
        losses = predictor(2, bag_size=bag_size, **kwargs).losses(raw, scene.targets)
        found = {name: value.item() for name, value in losses.items()}
        assert found == pytest.approx(expected(bag, background, bag_size), rel=5e-4), kwargs
        seen.add((round(found["positive"], 4), round(found["negative"], 5)))
    assert len(seen) == 7
    assert predictor().bag_size == 50
    module = FreeAnchor(256, [8, 16, 32, 64, 128], num_classes=80)
    assert module.anchors.per_position == 9 and module.postprocess.iou_threshold == 0.5
    assert not module.state_dict().keys() - {"cls.weight", "cls.bias", "box.weight", "box.bias"}


def test_the_background_gives_boxes_no_gradient() -> None:
    raw, scene = example()
    predictor().losses(raw, scene.targets)["negative"].backward()
    assert all(level["box"].grad is None for level in raw)
    assert all(level["cls"].grad.any() for level in raw)  # type: ignore[union-attr]


def test_a_prediction_that_is_the_object_is_no_background() -> None:
    """The best one above the threshold does not count, others in between count in part, other classes in full."""
    target = target_of([[8.0, 8, 40, 40]], [0])
    raw = random_maps(1, 2, 2)
    for level in raw:
        level["box"].data.fill_(0)
        level["cls"].data.fill_(-40)
    index = ANCHORS.index([8.0, 8, 40, 40])
    position = index // 2
    for k, chance in ((0, 0.5), (1, 0.0)):
        raw[0]["cls"].data[0, :, position // 7, position % 7] = -40
        raw[0]["cls"].data[0, k, position // 7, position % 7] = 0.0
        loss = predictor().losses(raw, [target])["negative"].item()
        expected = 0.0 if chance else 0.5 * 0.25 * math.log(2) / 50
        assert loss == pytest.approx(expected, abs=1e-9)
    # Nothing overlaps by more than the threshold: everything is background.
    far = target_of([[8.0, 8, 9, 9]], [1])
    assert predictor().losses(raw, [far])["negative"].item() == pytest.approx(0.5 * 0.25 * math.log(2) / 50, rel=1e-5)


def test_predictions_on_padding_take_no_object_from_those_on_the_image() -> None:
    """The best prediction of an object does not count as background; one on padding is none that could be the best."""
    raw = random_maps(1, 1, 2, spread=0.0)
    for level in raw:
        level["cls"].data.fill_(-40)
    size = (16, 16)
    box = [2.0, 3.0, 14.0, 13.0]
    index = ANCHORS.index([-8.0, -8, 24, 24])  # at 8, 8
    set_deltas(raw, 0, index, torch.tensor(encode(ANCHORS[index], [2.0, 3.0, 14.0, 12.0], STD)))  # IoU 0.9
    raw[0]["cls"].data[0, 0, 1, 1] = 0.0
    valid = valid_masks(torch.tensor([size]), SHAPES, STRIDES)
    target = [target_of([box])]
    assert predictor(1).losses(raw, target, valid)["negative"].item() == pytest.approx(0, abs=1e-7)
    beyond = ANCHORS.index([16.0, 16, 48, 48])
    set_deltas(raw, 0, beyond, torch.tensor(encode(ANCHORS[beyond], box, STD)))  # IoU 1
    assert predictor(1).losses(raw, target, valid)["negative"].item() == pytest.approx(0, abs=1e-7)
    kept = predictor(1, ignore_padding=False).losses(raw, target, valid)["negative"].item()
    assert kept == pytest.approx(0.5 * 0.125**2 * -math.log(0.875) / 50, rel=1e-3)  # three quarters object


@pytest.mark.parametrize("bag_size", [50, 1000])
def test_bags_hold_no_padding(bag_size: int) -> None:
    """An image of 16 x 16 has ten anchors; its bags have no more, whatever their size."""
    raw = random_maps(1, 1, 2)
    valid = valid_masks(torch.tensor([(16, 16)]), SHAPES, STRIDES)
    predictor(1, bag_size=bag_size).losses(raw, [target_of([[2.0, 3.0, 14.0, 13.0]])], valid)["positive"].backward()
    assert valid is not None
    for level, mask in zip(raw, valid, strict=True):
        assert level["cls"].grad is not None and level["box"].grad is not None
        assert not (level["cls"].grad * ~mask).any() and not (level["box"].grad * ~mask).any()


def test_empty_batches_train_the_background_and_touch_every_box() -> None:
    raw = random_maps(2, 2, 2)
    losses = predictor().losses(raw, [target_of([]), target_of([])])
    assert losses["positive"].item() == 0
    scene = Scene([(HEIGHT, WIDTH)] * 2, [target_of([]), target_of([])], 2, 0)
    assert losses["negative"].item() == pytest.approx(
        expected_losses(scene, raw, [EVERYWHERE] * 2)["negative"], rel=1e-4
    )
    (losses["positive"] + losses["negative"]).backward()
    for level in raw:
        assert level["box"].grad is not None and not level["box"].grad.any()
        assert level["cls"].grad is not None and level["cls"].grad.isfinite().all()


@pytest.mark.parametrize("logit", [-4.6, -40.0])
def test_small_boxes_have_their_full_loss_and_gradients(logit: float) -> None:
    """A one-pixel box is far from every anchor, so its likelihood is tiny; it must still be learned."""
    raw = random_maps(1, 1, 2, spread=0.1)
    for level in raw:
        level["cls"].data.fill_(logit)
    box = [20.5, 20.25, 21.5, 21.25]
    loss = predictor(1, bag_size=1000).losses(raw, [target_of([box])])["positive"]
    expected = positive_loss(rows_of(raw, "cls", 0, 1), rows_of(raw, "box", 0, 4), box, 0, EVERYWHERE, bag_size=1000)
    assert loss.item() == pytest.approx(expected, rel=1e-3)
    loss.backward()
    assert raw[0]["box"].grad is not None and raw[0]["box"].grad.abs().max() > 1e-3
    assert raw[0]["cls"].grad is not None and raw[0]["cls"].grad.abs().max() > 1e-3


def test_a_certain_anchor_dominates_its_bag() -> None:
    """The weights make the bag's likelihood that of its best anchor, once there is a good one."""
    raw = random_maps(1, 1, 2)
    for level in raw:
        level["box"].data.fill_(0)
        level["cls"].data.fill_(-4)
    index = ANCHORS.index([8.0, 8, 40, 40])
    raw[0]["cls"].data[0, 0, index // 2 // 7, index // 2 % 7] = 12.0
    loss = predictor(1).losses(raw, [target_of([[8.0, 8, 40, 40]])])["positive"].item()
    assert 0 < loss < 0.01  # the mean likelihood of the bag would give 0.5 * log(50)


def test_processes_share_the_mean_number_of_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, scene = example()
    alone = {k: v.item() for k, v in predictor().losses(raw, scene.targets).items()}
    monkeypatch.setattr(freeanchor, "reduce_mean", lambda value: value * 2)
    shared = {k: v.item() for k, v in predictor().losses(raw, scene.targets).items()}
    assert shared == pytest.approx({k: v / 2 for k, v in alone.items()}, rel=1e-5)


def test_boxes_are_decoded_with_the_stds_of_the_loss() -> None:
    raw = random_maps(1, 2, 2, spread=0.0)
    for level in raw:
        level["cls"].data.fill_(-30)
    raw[0]["cls"].data[0, 2 + 1, 2, 3] = 2.0  # second anchor, second class
    raw[0]["box"].data[0, 4:, 2, 3] = torch.tensor([1.0, -1.0, 2.0, 0.0])
    sizes = torch.tensor([[HEIGHT, WIDTH]])
    (found,) = predictor().detections(raw, ImageBatch(torch.zeros(1, 3, HEIGHT, WIDTH), sizes, sizes))
    x, y, width = 24 + 4.8, 16 - 2.4, 48 * math.exp(0.4)
    expected = [max(x - width / 2, 0), y - 12, min(x + width / 2, WIDTH), y + 12]
    assert found.boxes.tolist() == [pytest.approx(expected, abs=1e-3)]
    assert found.labels.tolist() == [1]
