"""FCOS in the conventions of three code bases, against loops in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from anchor_oracles import (
    BACKGROUND,
    HEIGHT,
    SHAPES,
    STRIDES,
    WIDTH,
    Scene,
    bce,
    centerness,
    distances,
    divisors,
    fcos_match,
    flags,
    focal,
    giou_loss,
    iou,
    random_maps,
    rows_of,
    scenes,
    sigmoid,
    target_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dyndet.models.predictors import fcos
from dyndet.models.predictors.fcos import FCOS
from dyndet.models.predictors.fcos_assign import CenterSampling
from dyndet.models.predictors.normalise import Normaliser
from dyndet.models.predictors.postprocess import Postprocess
from dyndet.structures import HeadOutput, ImageBatch

BASE = 24

PLAIN = {"centerness_on": "cls", "box_activation": "exp", "box_loss": "iou", "radius": None}
CONVENTIONS: dict[str, dict[str, Any]] = {
    "published": {},
    "mmdet": {"point_offset": 0.5, "box_normaliser_min": 1e-6, "score": "product"},
    "mmdet_plain": {"point_offset": 0.5, "box_normaliser_min": 1e-6, "score": "product", **PLAIN},
    "detectron2": {"point_offset": 0.5, "level_scales": False, "box_weighting": "uniform", "strict": True},
}


def predictor(classes: int = 2, **kwargs: Any) -> FCOS:
    torch.manual_seed(0)
    chosen = dict(kwargs)
    sampler = CenterSampling(
        radius=chosen.pop("radius", 1.5),
        base_range=BASE,
        strict=chosen.pop("strict", False),
    )
    return FCOS(4, STRIDES, num_classes=classes, assigner=sampler, **chosen)


def expected_losses(
    scene: Scene,
    raw: Sequence[dict[str, Tensor]],
    *,
    trained: Sequence[Sequence[bool]],
    mode: str = "total",
    point_offset: float = 0.0,
    radius: float | None = 1.5,
    strict: bool = False,
    box_activation: str = "relu",
    box_loss: str = "giou",
    box_weighting: str = "centerness",
    box_normaliser_min: float = 1.0,
    **_: object,
) -> dict[str, float]:
    where = [
        ((j + point_offset) * s, (i + point_offset) * s, s)
        for (rows, columns), s in zip(SHAPES, STRIDES, strict=True)
        for i in range(rows)
        for j in range(columns)
    ]
    sums: list[dict[str, float]] = []
    counts: list[int] = []
    weighted = quality_sum = 0.0
    for image in range(len(scene.sizes)):
        boxes, labels = scene.boxes(image), scene.labels(image)
        match = fcos_match(boxes, offset=point_offset, radius=radius, strict=strict, base=BASE)
        cls, box = rows_of(raw, "cls", image, scene.classes), rows_of(raw, "box", image, 4)
        quality = rows_of(raw, "centerness", image, 1)
        one = {"cls": 0.0, "box": 0.0, "centerness": 0.0}
        positives = 0
        for index, (x, y, s) in enumerate(where):
            if not trained[image][index]:
                continue
            g = match[index]
            one["cls"] += sum(focal(logit, g != BACKGROUND and k == labels[g]) for k, logit in enumerate(cls[index]))
            if g == BACKGROUND:
                continue
            positives += 1
            have = [max(v, 0) * s if box_activation == "relu" else math.exp(v) for v in box[index]]
            predicted = [x - have[0], y - have[1], x + have[2], y + have[3]]
            if box_loss == "giou":
                loss = giou_loss(predicted, boxes[g])
            else:
                loss = -math.log(max(iou(predicted, boxes[g]), 1e-6))
            ideal = centerness(distances(x, y, boxes[g]))
            one["box"] += loss
            weighted += ideal * loss
            quality_sum += ideal
            one["centerness"] += bce(quality[index][0], ideal)
        sums.append(one)
        counts.append(positives)
    shares = divisors(mode, counts)
    losses: dict[str, float] = {}
    for name in sums[0]:
        losses[name] = sum(one[name] / share for one, share in zip(sums, shares, strict=True))
    if box_weighting == "centerness":
        losses["box"] = weighted / max(quality_sum, box_normaliser_min)
    return losses


@settings(max_examples=60, deadline=None)
@given(
    scenes(lattice=True),
    st.sampled_from(sorted(CONVENTIONS)),
    st.sampled_from(["total", "images", "per_image"]),
    st.booleans(),
)
def test_losses(scene: Scene, name: str, mode: str, ignore: bool) -> None:
    convention = CONVENTIONS[name]
    module = predictor(
        scene.classes,
        normaliser=Normaliser(mode),  # type: ignore[arg-type]
        ignore_padding=ignore,
        **convention,
    )
    raw = scene.raw()
    if convention.get("box_activation") == "exp":
        with torch.no_grad():
            for level in raw:
                level["box"].add_(2.5)  # distances of about 12 pixels
    trained = [flags(size if ignore else (HEIGHT, WIDTH), 1) for size in scene.sizes]
    expected = expected_losses(scene, raw, trained=trained, mode=mode, **convention)
    losses = module.losses(raw, scene.targets, scene.valid())
    assert losses.keys() == expected.keys()
    for key, value in losses.items():
        assert value.shape == () and value.dtype == torch.float32
        assert value.item() == pytest.approx(expected[key], rel=5e-4, abs=1e-5), key


@pytest.mark.parametrize("name", sorted(CONVENTIONS))
def test_every_convention_has_its_own_box_loss(name: str) -> None:
    """The loops above would agree in images without positives; here there are some, and flips show."""
    target = target_of([[3.25, 4.5, 33.25, 38.5], [18.0, 10.0, 52.25, 40.75]], [1, 0])
    scene = Scene([(HEIGHT, WIDTH)], [target], 2, 0)
    everywhere = [flags((HEIGHT, WIDTH), 1)]
    raw = scene.raw()
    losses = {
        other: expected_losses(scene, raw, trained=everywhere, **CONVENTIONS[other])["box"] for other in CONVENTIONS
    }
    assert all(abs(value - losses[name]) > 1e-3 * losses[name] for other, value in losses.items() if other != name)
    found = predictor(**CONVENTIONS[name]).losses(raw, scene.targets)["box"].item()
    assert found == pytest.approx(losses[name], rel=1e-4)


def test_the_floor_of_the_box_divisor() -> None:
    """A single point of low centerness: divided by at least 1, or by hardly more than nothing."""
    target = target_of([[23.0, 9.0, 47.0, 41.0]])  # of the coarse level's points 32, 16 and 32, 32
    raw = random_maps(1, 1)
    scene = Scene([(HEIGHT, WIDTH)], [target], 1, 0)
    kwargs: dict[str, Any] = {"radius": None}
    values = [
        predictor(1, box_normaliser_min=floor, **kwargs).losses(raw, [target])["box"].item() for floor in (1.0, 1e-6)
    ]
    expected = [
        expected_losses(
            scene,
            raw,
            trained=[flags((HEIGHT, WIDTH), 1)],
            box_normaliser_min=floor,
            **kwargs,
        )["box"]
        for floor in (1.0, 1e-6)
    ]
    assert values == pytest.approx(expected, rel=1e-4)


def test_the_floor_may_be_0() -> None:
    """As in the authors' ATSS; a batch without positives has no summed centerness to divide by."""
    losses = predictor(box_normaliser_min=0.0).losses(random_maps(1, 2), [target_of([])])
    assert losses["box"].item() == 0


def test_processes_share_the_mean_of_the_summed_centerness(monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_of([[3.25, 4.5, 33.25, 38.5], [18.0, 10.0, 52.25, 40.75]], [1, 0])
    raw = random_maps(1, 2)
    alone = [predictor(box_weighting=w).losses(raw, [target])["box"].item() for w in ("centerness", "uniform")]
    monkeypatch.setattr(fcos, "reduce_mean", lambda value: value * 3)
    shared = [predictor(box_weighting=w).losses(raw, [target])["box"].item() for w in ("centerness", "uniform")]
    assert shared == pytest.approx([alone[0] / 3, alone[1]], rel=1e-5)


def test_the_moving_average_starts_at_300() -> None:
    target = target_of([[3.25, 4.5, 33.25, 38.5]], [1])
    raw = random_maps(1, 2)
    positives = sum(g >= 0 for g in fcos_match(target.boxes.tolist(), offset=0, radius=1.5, strict=False, base=BASE))
    total = predictor(box_weighting="uniform").losses(raw, [target])
    module = predictor(box_weighting="uniform", normaliser=Normaliser("ema", start=300.0))
    for name, value in module.losses(raw, [target]).items():
        assert value.item() == pytest.approx(total[name].item() * positives / (270 + 0.1 * positives), rel=1e-4)


def test_without_level_scales_no_parameter_is_left() -> None:
    with_scales, without = predictor(), predictor(level_scales=False)
    assert with_scales.state_dict().keys() - without.state_dict().keys() == {"scales"}
    without.load_state_dict({k: v for k, v in with_scales.state_dict().items() if k != "scales"})
    generator = torch.Generator().manual_seed(1)
    features = [torch.randn(1, 4, *shape, generator=generator) for shape in SHAPES]
    with torch.no_grad():
        assert with_scales.scales is not None
        with_scales.scales.copy_(torch.tensor([2.0, 0.5]))
    scaled, plain = (module(HeadOutput(features, features)) for module in (with_scales, without))
    for level, scale in enumerate([2.0, 0.5]):
        assert torch.allclose(scaled[level]["box"], plain[level]["box"] * scale)
        for name in ("cls", "centerness"):
            assert torch.equal(scaled[level][name], plain[level][name])


@pytest.mark.parametrize(("kernel", "reach"), [(3, 1), (1, 0)])
def test_kernels_reach_as_far_as_they_say(kernel: int, reach: int) -> None:
    module = predictor(kernel=kernel)
    features = [torch.zeros(1, 4, *shape) for shape in SHAPES]
    quiet = module(HeadOutput(features, features))[0]
    features[0] = features[0].clone()
    features[0][0, :, 2, 3] = 1.0
    loud = module(HeadOutput(features, features))[0]
    expected = [[i, j] for i in range(2 - reach, 3 + reach) for j in range(3 - reach, 4 + reach)]
    for name in ("cls", "box", "centerness"):
        assert (quiet[name] != loud[name]).any(1)[0].nonzero().tolist() == expected


@pytest.mark.parametrize(("score", "power"), [("sqrt", 0.5), ("product", 1.0)])
@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize("activation", ["relu", "exp"])
def test_decoding(score: str, power: float, offset: float, activation: str) -> None:
    raw = [{name: value.detach() for name, value in level.items()} for level in random_maps(1, 2)]
    for level in raw:
        level["cls"].fill_(-30)
    raw[1]["cls"][0, 1, 1, 2], raw[1]["centerness"][0, 0, 1, 2] = 1.0, -0.5
    raw[1]["box"][0, :, 1, 2] = torch.tensor([0.5, 0.25, 0.75, -0.5]) + (2 if activation == "exp" else 0)
    sizes = torch.tensor([[HEIGHT, WIDTH]])
    module = predictor(score=score, point_offset=offset, box_activation=activation)
    (found,) = module.detections(raw, ImageBatch(torch.zeros(1, 3, HEIGHT, WIDTH), sizes, sizes))
    x, y = (2 + offset) * 16, (1 + offset) * 16
    ltrb = [8.0, 4.0, 12.0, 0.0] if activation == "relu" else [math.exp(v) for v in (2.5, 2.25, 2.75, 1.5)]
    assert found.boxes.tolist() == [pytest.approx([x - ltrb[0], y - ltrb[1], x + ltrb[2], y + ltrb[3]], rel=1e-5)]
    assert found.scores.tolist() == [pytest.approx((sigmoid(1.0) * sigmoid(-0.5)) ** power, rel=1e-5)]


def test_the_threshold_is_on_the_probability_not_on_the_final_score() -> None:
    raw = [{name: torch.zeros_like(value) for name, value in level.items()} for level in random_maps(1, 1)]
    for level in raw:
        level["cls"].fill_(-30)
        level["box"].fill_(1.0)
    raw[0]["cls"][0, 0, 2, 2] = math.log(0.15 / 0.85)
    raw[0]["centerness"][0, 0, 2, 2] = 8.0  # sqrt(0.15) = 0.39
    raw[0]["cls"][0, 0, 4, 5] = math.log(0.25 / 0.75)
    raw[0]["centerness"][0, 0, 4, 5] = -8.0  # sqrt(0.25 * 0.0003) = 0.009
    sizes = torch.tensor([[HEIGHT, WIDTH]])
    module = predictor(1, postprocess=Postprocess(score_threshold=0.2))
    (found,) = module.detections(raw, ImageBatch(torch.zeros(1, 3, HEIGHT, WIDTH), sizes, sizes))
    assert found.scores.tolist() == [pytest.approx(math.sqrt(0.25 * sigmoid(-8.0)), rel=1e-4)]


@pytest.mark.parametrize("key", ["centerness_on", "box_activation", "box_loss", "box_weighting", "score"])
def test_unknown_conventions_are_named(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} must be one of .*, got 'other'"):
        predictor(2, **{key: "other"})
