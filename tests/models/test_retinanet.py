"""RetinaNet: losses against loops in float64, and the conventions in which code bases differ."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from anchor_oracles import (
    BACKGROUND,
    HEIGHT,
    IGNORED,
    SHAPES,
    STRIDES,
    WIDTH,
    AmbiguousError,
    Scene,
    decode,
    divisors,
    encode,
    flags,
    focal,
    grid_anchors,
    iou_match,
    random_maps,
    rows_of,
    scenes,
    sigmoid,
    smooth_l1,
    target_of,
)
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dyndet.models.predictors.anchors import AnchorGrid, BoxCoder
from dyndet.models.predictors.normalise import Normaliser
from dyndet.models.predictors.postprocess import Postprocess
from dyndet.models.predictors.retinanet import RetinaNet
from dyndet.structures import HeadOutput, ImageBatch

ONES = (1.0, 1.0, 1.0, 1.0)
SCALES, RATIOS = (2.0, 4.0), (0.25, 1.0, 4.0)  # square roots without rounding
SIDES = {
    "scale": [(s / r**0.5, s * r**0.5) for r in RATIOS for s in SCALES],
    "ratio": [(s / r**0.5, s * r**0.5) for s in SCALES for r in RATIOS],
}


def predictor(classes: int = 2, order: str = "scale", offset: float = 0.0, **kwargs: object) -> RetinaNet:
    torch.manual_seed(0)
    grid = AnchorGrid(SCALES, RATIOS, offset, order)  # type: ignore[arg-type]
    return RetinaNet(4, STRIDES, num_classes=classes, anchors=grid, **kwargs)  # type: ignore[arg-type]


def expected_losses(
    scene: Scene,
    raw: Sequence[dict[str, Tensor]],
    *,
    trained: Sequence[Sequence[bool]],
    order: str = "scale",
    offset: float = 0.0,
    mode: str = "images",
    std: Sequence[float] = ONES,
    beta: float = 0.0,
    alpha: float = 0.25,
    gamma: float = 2.0,
    weight: float = 1.0,
) -> dict[str, float]:
    anchors = [anchor for level in grid_anchors(SIDES[order], offset) for anchor in level]
    sums, counts = [], []
    for image in range(len(scene.sizes)):
        boxes, labels = scene.boxes(image), scene.labels(image)
        match = iou_match(anchors, boxes, trained[image])
        cls, deltas = rows_of(raw, "cls", image, scene.classes), rows_of(raw, "box", image, 4)
        cls_sum = box_sum = 0.0
        positives = 0
        for index, anchor in enumerate(anchors):
            g = match[index]
            if not trained[image][index] or g == IGNORED:
                continue
            label = -1 if g == BACKGROUND else labels[g]
            cls_sum += sum(focal(logit, k == label, alpha, gamma) for k, logit in enumerate(cls[index]))
            if g != BACKGROUND:
                positives += 1
                wanted = encode(anchor, boxes[g], std)
                box_sum += sum(smooth_l1(a - b, beta) for a, b in zip(deltas[index], wanted, strict=True))
        sums.append((cls_sum, weight * box_sum))
        counts.append(positives)
    shares = divisors(mode, counts)
    return {
        name: sum(s[n] / share for s, share in zip(sums, shares, strict=True)) for n, name in enumerate(("cls", "box"))
    }


@settings(max_examples=60, deadline=None)
@given(
    scenes(lattice=True),
    st.sampled_from(["scale", "ratio"]),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from(["images", "total", "per_image"]),
    st.sampled_from([(True, None), (False, None), (False, 16), (False, 32)]),
    st.sampled_from([(ONES, 0.0), ((0.1, 0.1, 0.2, 0.2), 0.0), (ONES, 0.1)]),
)
def test_losses(
    scene: Scene,
    order: str,
    offset: float,
    mode: str,
    padding: tuple[bool, int | None],
    box: tuple[tuple[float, ...], float],
) -> None:
    (ignore, divisor), (std, beta) = padding, box
    module = predictor(
        scene.classes,
        order,
        offset,
        normaliser=Normaliser(mode),  # type: ignore[arg-type]
        coder=BoxCoder(std),
        beta=beta,
        ignore_padding=ignore,
        valid_divisor=divisor,
    )
    trained = [flags(size, 6, 1 if ignore else divisor or 10**6) for size in scene.sizes]
    raw = scene.raw(6)
    try:
        expected = expected_losses(
            scene, raw, trained=trained, order=order, offset=offset, mode=mode, std=std, beta=beta
        )
    except AmbiguousError:
        reject()
    losses = module.losses(raw, scene.targets, scene.valid())
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        assert value.shape == () and value.dtype == torch.float32
        assert value.item() == pytest.approx(expected[name], rel=2e-4, abs=1e-6), name


def one_image() -> Scene:
    return Scene([(HEIGHT, WIDTH)], [target_of([[3.25, 4.5, 33.25, 38.5], [20.0, 10.0, 52.25, 40.75]], [1, 0])], 2, 0)


def test_the_published_constants() -> None:
    """Nine anchors, focal loss with 0.25 and 2, L1 on plain deltas, each with weight 1."""
    scene, raw = one_image(), random_maps(1, 2, 6)
    everywhere = [flags((HEIGHT, WIDTH), 6)]
    found = predictor().losses(raw, scene.targets)
    assert {k: v.item() for k, v in found.items()} == pytest.approx(
        expected_losses(scene, raw, trained=everywhere), rel=1e-4
    )
    changed = predictor(alpha=0.5, gamma=1.5, box_weight=50.0, beta=0.1).losses(raw, scene.targets)
    expected = expected_losses(scene, raw, trained=everywhere, alpha=0.5, gamma=1.5, weight=50.0, beta=0.1)
    assert {k: v.item() for k, v in changed.items()} == pytest.approx(expected, rel=1e-4)
    module = RetinaNet(256, [8, 16, 32, 64, 128], num_classes=80)
    assert module.anchors.per_position == 9 and module.anchors.offset == 0
    assert (module.postprocess.score_threshold, module.postprocess.iou_threshold) == (0.05, 0.5)
    towers = 2 * 4 * (256 * 256 * 9 + 256)
    assert sum(p.numel() for p in module.parameters()) + towers == 6_463_220


def test_the_moving_average_divides_both_losses() -> None:
    scene, raw = one_image(), random_maps(1, 2, 6)
    total = predictor(normaliser=Normaliser("total")).losses(raw, scene.targets)
    anchors = [anchor for level in grid_anchors(SIDES["scale"], 0.0) for anchor in level]
    positives = sum(g >= 0 for g in iou_match(anchors, scene.boxes(0), flags((HEIGHT, WIDTH), 6)))
    module = predictor(normaliser=Normaliser("ema"))
    average = 100.0
    for training in (True, True, False, True):
        module.train(training)
        average = 0.9 * average + 0.1 * positives if training else average
        for name, value in module.losses(raw, scene.targets).items():
            assert value.item() == pytest.approx(total[name].item() * positives / average, rel=1e-4)
    assert module.state_dict()["normaliser.average"].item() == pytest.approx(average)


def blank(classes: int = 2) -> list[dict[str, Tensor]]:
    return [{"cls": torch.full((1, 6 * classes, *s), -30.0), "box": torch.zeros(1, 24, *s)} for s in SHAPES]


def batch(height: int = HEIGHT, width: int = WIDTH) -> ImageBatch:
    sizes = torch.tensor([[height, width]])
    return ImageBatch(torch.zeros(1, 3, HEIGHT, WIDTH), sizes, sizes)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1),
    st.integers(0, 5),
    st.integers(0, 6),
    st.integers(0, 5),
    st.integers(0, 1),
    st.sampled_from(["scale", "ratio"]),
    st.sampled_from([0.0, 0.5]),
    st.integers(0, 99),
)
def test_one_planted_logit_finds_its_anchor_and_its_deltas(
    level: int, i: int, j: int, a: int, k: int, order: str, offset: float, seed: int
) -> None:
    i, j = i % SHAPES[level][0], j % SHAPES[level][1]
    raw = blank()
    for empty, filled in zip(raw, random_maps(1, 2, 6, seed=seed, spread=0.2), strict=True):
        empty["box"] = filled["box"].detach()
    raw[level]["cls"][0, a * 2 + k, i, j] = 1.0
    s = STRIDES[level]
    (x, y), (w, h) = ((j + offset) * s, (i + offset) * s), SIDES[order][a]
    anchor = [x - w * s / 2, y - h * s / 2, x + w * s / 2, y + h * s / 2]
    box = decode(anchor, raw[level]["box"][0, a * 4 : a * 4 + 4, i, j].tolist(), ONES)
    clipped = [min(max(v, 0), most) for v, most in zip(box, [WIDTH, HEIGHT] * 2, strict=True)]
    assume(clipped[2] - clipped[0] > 1 and clipped[3] - clipped[1] > 1)
    (found,) = predictor(order=order, offset=offset).detections(raw, batch())
    assert found.boxes.tolist() == [pytest.approx(clipped, abs=1e-3)]
    assert found.labels.tolist() == [k]
    assert found.scores.tolist() == [pytest.approx(sigmoid(1.0), rel=1e-5)]


@pytest.mark.parametrize(("clamp", "width"), [("both", 16 * 16 / 1000), ("upper", 16 * math.exp(-5))])
def test_the_coder_clamps_as_told(clamp: str, width: float) -> None:
    raw = blank(1)
    raw[0]["cls"][0, 2, 2, 3] = 1.0  # ratio 1, scale 2: 16 pixels
    raw[0]["box"][0, 8 + 2, 2, 3] = -5.0
    (found,) = predictor(1, coder=BoxCoder(clamp=clamp)).detections(raw, batch())  # type: ignore[arg-type]
    assert (found.boxes[0, 2] - found.boxes[0, 0]).item() == pytest.approx(width, rel=1e-3)


def test_the_coder_says_in_what_units_deltas_are() -> None:
    raw = blank(1)
    raw[0]["cls"][0, 2, 2, 3] = 1.0
    raw[0]["box"][0, 8, 2, 3] = 1.0
    lefts = []
    for std in (ONES, (0.1, 0.1, 0.2, 0.2)):
        (found,) = predictor(1, coder=BoxCoder(std)).detections(raw, batch())
        lefts.append(found.boxes[0, 0].item())
    assert lefts == pytest.approx([24 - 8 + 16, 24 - 8 + 1.6])


@pytest.mark.parametrize(("clip", "count"), [("before", 1), ("after", 2)])
def test_clipping_before_suppression_joins_what_differs_outside(clip: str, count: int) -> None:
    """Two boxes that differ beyond the image: cut to it they are the same."""
    raw = blank(1)
    raw[0]["cls"][0, 2, 0, 0], raw[0]["cls"][0, 3, 0, 0] = 2.0, 1.0  # squares of 16 and 32 pixels at 0, 0
    raw[0]["box"][0, 12:14, 0, 0] = -0.25  # moves the second by 8 pixels: -24..8
    postprocess = Postprocess(iou_threshold=0.5, clip=clip)  # type: ignore[arg-type]
    (found,) = predictor(1, postprocess=postprocess).detections(raw, batch())
    assert found.boxes.tolist() == [[0, 0, 8, 8]] * count


def test_separable_convolutions_are_depthwise_then_pointwise() -> None:
    module = predictor(3, separable=True)
    assert isinstance(module.cls, nn.Sequential)
    shapes = [tuple(p.shape) for p in module.cls.parameters()]
    assert shapes == [(4, 1, 3, 3), (18, 4, 1, 1), (18,)]
    assert module.cls[-1].bias.tolist() == pytest.approx([-math.log(99)] * 18)  # type: ignore[union-attr]
    features = [torch.randn(1, 4, *shape) for shape in SHAPES]
    raw = module(HeadOutput(features, features))
    assert [level["cls"].shape for level in raw] == [(1, 18, *shape) for shape in SHAPES]
    assert [level["box"].shape for level in raw] == [(1, 24, *shape) for shape in SHAPES]
    module.losses(raw, [target_of([[3, 3, 30, 30]])])["cls"].backward()


def test_labels_outside_the_classes_are_named() -> None:
    with pytest.raises(ValueError, match=r"0\.\.1 .* reach from -1 to 1"):
        predictor().losses(random_maps(1, 2, 6), [target_of([[0, 0, 9, 9], [0, 0, 20, 20]], [1, -1])])
