"""ATSS: losses against loops in float64, and the conventions in which code bases differ."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from anchor_oracles import (
    BACKGROUND,
    HEIGHT,
    SHAPES,
    STRIDES,
    WIDTH,
    AmbiguousError,
    Scene,
    atss_match,
    bce,
    centerness,
    decode,
    distances,
    divisors,
    flags,
    focal,
    giou_loss,
    random_maps,
    rows_of,
    scenes,
    sigmoid,
    square_anchors,
    target_of,
)
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from dyndet.models.predictors import atss
from dyndet.models.predictors.atss import ATSS
from dyndet.models.predictors.atss_assign import AdaptiveAssigner
from dyndet.models.predictors.normalise import Normaliser
from dyndet.models.predictors.postprocess import Postprocess
from dyndet.ops.grid import valid_masks
from dyndet.structures import HeadOutput, ImageBatch

STD = (0.1, 0.1, 0.2, 0.2)


def predictor(classes: int = 2, **kwargs: object) -> ATSS:
    torch.manual_seed(0)
    return ATSS(4, STRIDES, num_classes=classes, scale=4.0, **kwargs)  # type: ignore[arg-type]


def expected_losses(
    scene: Scene,
    raw: Sequence[dict[str, Tensor]],
    *,
    trained: Sequence[Sequence[bool]],
    offset: float = 0.0,
    mode: str = "images",
    floor: float = 1.0,
    weight: float = 2.0,
    topk: int = 9,
) -> dict[str, float]:
    levels = square_anchors(4.0, offset)
    anchors = [anchor for level in levels for anchor in level]
    sums: list[dict[str, float]] = []
    box_sum = quality_sum = 0.0
    counts = []
    for image in range(len(scene.sizes)):
        boxes, labels = scene.boxes(image), scene.labels(image)
        match = atss_match(levels, boxes, trained[image], topk)
        cls, deltas = rows_of(raw, "cls", image, scene.classes), rows_of(raw, "box", image, 4)
        quality = rows_of(raw, "centerness", image, 1)
        cls_sum = centerness_sum = 0.0
        for index, anchor in enumerate(anchors):
            if not trained[image][index]:
                continue
            g = match[index]
            label = labels[g] if g != BACKGROUND else -1
            cls_sum += sum(focal(logit, k == label) for k, logit in enumerate(cls[index]))
            if g == BACKGROUND:
                continue
            ideal = centerness(distances((anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2, boxes[g]))
            box_sum += ideal * giou_loss(decode(anchor, deltas[index], STD), boxes[g])
            quality_sum += ideal
            centerness_sum += bce(quality[index][0], ideal)
        counts.append(sum(g != BACKGROUND for g in match))
        sums.append({"cls": cls_sum, "centerness": centerness_sum})
    shares = divisors(mode, counts)
    losses = {name: sum(s[name] / share for s, share in zip(sums, shares, strict=True)) for name in sums[0]}
    losses["box"] = weight * box_sum / max(quality_sum, floor) if quality_sum else 0.0
    return losses


@settings(max_examples=80, deadline=None)
@given(
    scenes(lattice=False),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from(["images", "total", "per_image"]),
    st.sampled_from([1.0, 0.0]),
    st.sampled_from([(True, None), (False, None), (False, 16), (False, 32)]),
)
def test_losses(scene: Scene, offset: float, mode: str, floor: float, padding: tuple[bool, int | None]) -> None:
    ignore, divisor = padding
    module = predictor(
        scene.classes,
        center_offset=offset,
        normaliser=Normaliser(mode),  # type: ignore[arg-type]
        box_normaliser_min=floor,
        ignore_padding=ignore,
        valid_divisor=divisor,
    )
    own = [flags(size, 1, 1 if ignore else divisor or 10**6) for size in scene.sizes]
    raw = scene.raw()
    try:
        expected = expected_losses(scene, raw, trained=own, offset=offset, mode=mode, floor=floor)
    except AmbiguousError:
        reject()
    losses = module.losses(raw, scene.targets, scene.valid())
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        assert value.shape == () and value.dtype == torch.float32
        assert value.item() == pytest.approx(expected[name], rel=2e-4, abs=1e-6), name


def one_image() -> Scene:
    return Scene([(HEIGHT, WIDTH)], [target_of([[3.1, 4.2, 33.3, 38.4], [20.2, 10.6, 52.1, 40.8]], [1, 0])], 2, 0)


def test_the_example_has_positives() -> None:
    scene = one_image()
    match = atss_match(square_anchors(4.0, 0.0), scene.boxes(0), flags((HEIGHT, WIDTH), 1), 9)
    assert min(match.count(0), match.count(1)) >= 2


def test_the_floor_of_the_box_divisor() -> None:
    """One positive of centerness below 1: divided by 1 (mmdetection), or by its centerness (the authors)."""
    raw = random_maps(1, 1)
    target = target_of([[21.0, 13.5, 40.0, 40.0]])
    scene = Scene([(HEIGHT, WIDTH)], [target], 1, 0)
    everywhere = [flags((HEIGHT, WIDTH), 1)]
    kwargs = {"assigner": AdaptiveAssigner(topk=2)}
    published = predictor(1, **kwargs).losses(raw, [target])["box"].item()
    authors = predictor(1, box_normaliser_min=0.0, **kwargs).losses(raw, [target])["box"].item()
    expected = [expected_losses(scene, raw, trained=everywhere, floor=floor, topk=2)["box"] for floor in (1.0, 0.0)]
    assert expected[1] > 1.05 * expected[0]
    assert [published, authors] == pytest.approx(expected, rel=1e-4)
    twice = predictor(1, box_weight=4.0, **kwargs).losses(raw, [target])["box"].item()
    assert twice == pytest.approx(2 * published)


def test_processes_share_the_mean_of_the_summed_centerness(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, target = random_maps(1, 2), one_image().targets[0]
    alone = predictor().losses(raw, [target])["box"].item()
    monkeypatch.setattr(atss, "reduce_mean", lambda value: value * 3)
    assert predictor().losses(raw, [target])["box"].item() == pytest.approx(alone / 3, rel=1e-5)
    monkeypatch.setattr(atss, "reduce_mean", lambda value: value * 1e-3)  # the floor comes after the mean
    total = sum_of_centerness()
    assert predictor().losses(raw, [target])["box"].item() == pytest.approx(alone * total, rel=1e-4)


def sum_of_centerness() -> float:
    scene = one_image()
    levels = square_anchors(4.0, 0.0)
    match = atss_match(levels, scene.boxes(0), flags((HEIGHT, WIDTH), 1), 9)
    anchors = [anchor for level in levels for anchor in level]
    total = sum(
        centerness(distances((a[0] + a[2]) / 2, (a[1] + a[3]) / 2, scene.boxes(0)[g]))
        for a, g in zip(anchors, match, strict=True)
        if g != BACKGROUND
    )
    assert total > 1
    return total


def test_box_gradients_do_not_reach_the_centerness_and_the_other_way() -> None:
    raw = random_maps(1, 2)
    losses = predictor().losses(raw, one_image().targets)
    losses["box"].backward()
    assert all(level["centerness"].grad is None for level in raw)
    assert any(level["box"].grad.any() for level in raw)  # type: ignore[union-attr]


def blank(classes: int = 2) -> list[dict[str, Tensor]]:
    return [
        {"cls": torch.full((1, classes, *s), -30.0), "box": torch.zeros(1, 4, *s), "centerness": torch.zeros(1, 1, *s)}
        for s in SHAPES
    ]


def batch(sizes: Sequence[tuple[int, int]] = ((HEIGHT, WIDTH),)) -> ImageBatch:
    return ImageBatch(torch.zeros(len(sizes), 3, HEIGHT, WIDTH), torch.tensor(sizes), torch.tensor(sizes))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 1),
    st.integers(0, 5),
    st.integers(0, 6),
    st.integers(0, 1),
    st.sampled_from([0.0, 0.5]),
    st.integers(0, 99),
)
def test_one_planted_logit_finds_its_box(level: int, i: int, j: int, k: int, offset: float, seed: int) -> None:
    i, j = i % SHAPES[level][0], j % SHAPES[level][1]
    raw = blank()
    boxes = random_maps(1, 2, seed=seed)
    for empty, filled in zip(raw, boxes, strict=True):
        empty["box"] = filled["box"].detach()
    raw[level]["cls"][0, k, i, j] = 1.0
    raw[level]["centerness"][0, 0, i, j] = -0.5
    s = STRIDES[level]
    x, y = (j + offset) * s, (i + offset) * s
    deltas = raw[level]["box"][0, :, i, j].tolist()
    box = decode([x - 2 * s, y - 2 * s, x + 2 * s, y + 2 * s], deltas, STD)
    clipped = [min(max(v, 0), most) for v, most in zip(box, [WIDTH, HEIGHT] * 2, strict=True)]
    assume(clipped[2] - clipped[0] > 1 and clipped[3] - clipped[1] > 1)
    (found,) = predictor(center_offset=offset).detections(raw, batch())
    assert found.boxes.tolist() == [pytest.approx(clipped, abs=1e-3)]
    assert found.labels.tolist() == [k]
    # The product, without the square root of the original code; the threshold sees the probability alone.
    assert found.scores.tolist() == [pytest.approx(sigmoid(1.0) * sigmoid(-0.5), rel=1e-5)]


def test_candidates_are_filtered_by_probability_before_centerness() -> None:
    raw = blank(1)
    raw[0]["cls"][0, 0, 2, 2], raw[0]["centerness"][0, 0, 2, 2] = math.log(0.06 / 0.94), -3.0  # 0.06 * 0.047
    raw[0]["cls"][0, 0, 4, 5], raw[0]["centerness"][0, 0, 4, 5] = math.log(0.04 / 0.96), 3.0
    (found,) = predictor(1).detections(raw, batch())
    assert found.scores.tolist() == [pytest.approx(0.06 * sigmoid(-3.0), rel=1e-4)]


@pytest.mark.parametrize(("rank", "best"), [("probability", 0.8 * sigmoid(-3.0)), ("score", 0.5 * sigmoid(3.0))])
def test_the_first_k_by_probability_or_by_final_score(rank: str, best: float) -> None:
    raw = blank(1)
    raw[0]["cls"][0, 0, 0, 0], raw[0]["centerness"][0, 0, 0, 0] = math.log(0.8 / 0.2), -3.0
    raw[0]["cls"][0, 0, 5, 6], raw[0]["centerness"][0, 0, 5, 6] = 0.0, 3.0
    module = predictor(1, postprocess=Postprocess(topk=1, rank=rank))  # type: ignore[arg-type]
    (found,) = module.detections(raw, batch())
    assert found.scores.tolist() == [pytest.approx(best, rel=1e-5)]


def test_defaults_rank_by_probability_and_suppress_above_0_6() -> None:
    defaults = predictor().postprocess
    assert (defaults.score_threshold, defaults.topk, defaults.iou_threshold, defaults.max_detections) == (
        0.05, 1000, 0.6, 100,
    )  # fmt: skip
    assert (defaults.rank, defaults.clip) == ("probability", "before")


@pytest.mark.parametrize(("ignore", "count"), [(True, 0), (False, 1)])
def test_padding_detects_only_where_asked(ignore: bool, count: int) -> None:
    raw = blank(1)
    raw[0]["cls"][0, 0, 3, 2] = 2.0  # y = 24 on an image of height 20; its anchor reaches up to 8
    size = [(20, WIDTH)]
    valid = valid_masks(torch.tensor(size), SHAPES, STRIDES)
    (found,) = predictor(1, ignore_padding=ignore).detections(raw, batch(size), valid)
    assert len(found) == count
    if count:
        assert found.boxes.tolist() == [pytest.approx([0, 8, 32, 20])]


@pytest.mark.parametrize(("kernel", "reach"), [(3, 1), (1, 0)])
def test_kernels_reach_as_far_as_they_say(kernel: int, reach: int) -> None:
    module = predictor(kernel=kernel)
    features = [torch.zeros(1, 4, *shape) for shape in SHAPES]
    quiet = module(HeadOutput(features, features))
    features[0] = features[0].clone()
    features[0][0, :, 2, 3] = 1.0
    loud = module(HeadOutput(features, features))
    for name in ("cls", "box", "centerness"):
        changed = (quiet[0][name] != loud[0][name]).any(1)[0].nonzero().tolist()
        assert changed == [
            [i, j] for i in range(2 - reach, 3 + reach) for j in range(3 - reach, 4 + reach)
        ]  # and nothing elsewhere
        assert torch.equal(quiet[1][name], loud[1][name])


def test_the_default_kernel_is_3_and_2_is_refused() -> None:
    assert predictor().cls.weight.shape[-2:] == (3, 3)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="kernel must be odd, got 2"):
        predictor(kernel=2)


@pytest.mark.parametrize(("classes", "kernel", "count"), [(80, 1, 21_850), (80, 3, 195_930)])
def test_published_numbers_of_parameters(classes: int, kernel: int, count: int) -> None:
    module = ATSS(256, [8, 16, 32, 64, 128], num_classes=classes, kernel=kernel)
    assert sum(p.numel() for p in module.parameters()) == count


def test_weights_start_as_published() -> None:
    module = ATSS(256, STRIDES, num_classes=80)
    for conv in (module.cls, module.box, module.centerness):
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.1)  # type: ignore[union-attr]
        assert conv.weight.mean().item() == pytest.approx(0, abs=1e-3)  # type: ignore[union-attr]
    assert module.cls.bias.tolist() == pytest.approx([-4.59512] * 80)  # type: ignore[union-attr]
    assert not module.box.bias.any() and not module.centerness.bias.any()  # type: ignore[union-attr]
    assert module.scales.tolist() == [1, 1]


def test_centerness_and_boxes_read_the_regression_tower_and_levels_scale_boxes_alone() -> None:
    module = predictor()
    generator = torch.Generator().manual_seed(1)
    cls, reg = ([torch.randn(1, 4, *shape, generator=generator) for shape in SHAPES] for _ in range(2))
    with torch.no_grad():
        module.scales.copy_(torch.tensor([2.0, 0.5]))
    raw = module(HeadOutput(cls, reg))
    for level, scale in enumerate([2.0, 0.5]):
        assert torch.equal(raw[level]["cls"], module.cls(cls[level]))
        assert torch.allclose(raw[level]["box"], module.box(reg[level]) * scale)
        assert torch.equal(raw[level]["centerness"], module.centerness(reg[level]))


def test_labels_outside_the_classes_are_named() -> None:
    with pytest.raises(ValueError, match=r"0\.\.1 .* reach from 1 to 2"):
        predictor().losses(random_maps(1, 2), [target_of([[0, 0, 9, 9], [0, 0, 20, 20]], [1, 2])])
