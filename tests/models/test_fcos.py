"""The FCOS predictor against brute-force oracles in float64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dyndet.models.predictors.fcos import FCOS
from dyndet.models.predictors.fcos_assign import CenterSampling, regress_ranges
from dyndet.models.predictors.postprocess import Postprocess
from dyndet.ops.grid import level_points, valid_masks
from dyndet.structures import HeadOutput, ImageBatch, Target

STRIDES = [8, 16]
SHAPES = [(8, 10), (4, 5)]
CLASSES = 3

boxes_strategy = st.lists(
    st.tuples(st.floats(0, 60), st.floats(0, 50), st.floats(1, 70), st.floats(1, 60)), min_size=0, max_size=5
)


def target_of(rows: list[tuple[float, float, float, float]]) -> Target:
    boxes = torch.tensor([(x, y, x + w, y + h) for x, y, w, h in rows]).reshape(-1, 4)
    labels = torch.arange(len(rows)) % CLASSES
    return Target(boxes, labels, torch.zeros(len(rows), dtype=torch.bool))


def points(offset: float = 0.0) -> list[Tensor]:
    return [
        level_points(shape, stride, offset, torch.device("cpu")) for shape, stride in zip(SHAPES, STRIDES, strict=True)
    ]


def brute_force(target: Target, radius: float | None, offset: float) -> list[int]:
    """Label per point, CLASSES for background; -1 where two equally small boxes tie."""
    labels = []
    ranges = regress_ranges(2, 32)
    for level, (shape, stride) in enumerate(zip(SHAPES, STRIDES, strict=True)):
        for i in range(shape[0]):
            for j in range(shape[1]):
                x, y = (j + offset) * stride, (i + offset) * stride
                found = []
                for box, label in zip(target.boxes.tolist(), target.labels.tolist(), strict=True):
                    left, top, right, bottom = x - box[0], y - box[1], box[2] - x, box[3] - y
                    inside = min(left, top, right, bottom) > 0
                    if radius is not None:
                        cx, cy = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
                        inside &= abs(x - cx) < radius * stride and abs(y - cy) < radius * stride
                    if inside and ranges[level][0] <= max(left, top, right, bottom) <= ranges[level][1]:
                        found.append(((box[2] - box[0]) * (box[3] - box[1]), label))
                found.sort()
                tie = len(found) > 1 and found[1][0] - found[0][0] < 1e-2
                labels.append(-1 if tie else found[0][1] if found else CLASSES)
    return labels


@settings(max_examples=50, deadline=None)
@given(boxes_strategy, st.sampled_from([1.5, None]), st.sampled_from([0.0, 0.5]))
def test_assignment_against_brute_force(rows: list, radius: float | None, offset: float) -> None:
    rows = [tuple(round(value * 4) / 4 + 0.125 for value in row) for row in rows]  # off the points: no ties at edges
    target = target_of(rows)
    assigned = CenterSampling(radius=radius, base_range=32)(points(offset), STRIDES, target, CLASSES)
    expected = brute_force(target, radius, offset)
    actual = [a if e != -1 else -1 for a, e in zip(assigned.labels.tolist(), expected, strict=True)]
    assert actual == expected


def test_ranges() -> None:
    assert regress_ranges(5) == [(-1, 64), (64, 128), (128, 256), (256, 512), (512, 1e8)]


def predictor(**kwargs: object) -> FCOS:
    torch.manual_seed(0)
    return FCOS(4, STRIDES, num_classes=CLASSES, assigner=CenterSampling(base_range=32), **kwargs)  # type: ignore[arg-type]


def features(batch: int = 2, seed: int = 0) -> HeadOutput:
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(batch, 4, *shape, generator=generator) for shape in SHAPES]
    return HeadOutput(maps, maps)


def focal(logit: float, positive: bool, alpha: float, gamma: float) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -alpha * (1 - p) ** gamma * math.log(p) if positive else -(1 - alpha) * p**gamma * math.log(1 - p)


@pytest.mark.parametrize(("padded", "classification"), [
    (False, {}), (True, {}), (True, {"alpha": 0.5, "gamma": 1.0, "cls_weight": 3.0}),
])  # fmt: skip
def test_losses_against_a_loop(padded: bool, classification: dict[str, float]) -> None:
    module = predictor(**classification)
    alpha, gamma = classification.get("alpha", 0.25), classification.get("gamma", 2.0)
    raw = module(features())
    targets = [target_of([(5.2, 7.3, 30, 25), (20.4, 9.1, 50, 44)]), target_of([])]
    sizes = torch.tensor([[64, 80], [40, 48]]) if padded else torch.tensor([[64, 80]] * 2)
    valid = valid_masks(sizes, SHAPES, STRIDES)
    assert (valid is not None) == padded
    losses = module.losses(raw, targets, valid)

    flat = [{k: v.double().flatten(2).transpose(1, 2) for k, v in level.items()} for level in raw]
    cls_sum = box_sum = quality_sum = centerness_sum = 0.0
    positives = 0
    for image, target in enumerate(targets):
        labels = brute_force(target, 1.5, 0.0)
        index = 0
        for level, (shape, stride) in enumerate(zip(SHAPES, STRIDES, strict=True)):
            for position in range(shape[0] * shape[1]):
                i, j = divmod(position, shape[1])
                label = labels[index]
                index += 1
                if padded and (i * stride >= sizes[image, 0] or j * stride >= sizes[image, 1]):
                    continue
                logits = flat[level]["cls"][image, position].tolist()
                cls_sum += sum(focal(logit, k == label, alpha, gamma) for k, logit in enumerate(logits))
                if label == CLASSES:
                    continue
                positives += 1
                matches = [b for b, k in zip(target.boxes.tolist(), target.labels.tolist(), strict=True) if k == label]
                box = matches[0]
                x, y = j * stride, i * stride
                want = [x - box[0], y - box[1], box[2] - x, box[3] - y]
                have = [max(v, 0) * stride for v in flat[level]["box"][image, position].tolist()]
                quality = math.sqrt(
                    min(want[0], want[2]) / max(want[0], want[2]) * min(want[1], want[3]) / max(want[1], want[3])
                )
                overlap = (min(have[0], want[0]) + min(have[2], want[2])) * (
                    min(have[1], want[1]) + min(have[3], want[3])
                )
                union = (have[0] + have[2]) * (have[1] + have[3]) + (want[0] + want[2]) * (want[1] + want[3]) - overlap
                hull = (max(have[0], want[0]) + max(have[2], want[2])) * (max(have[1], want[1]) + max(have[3], want[3]))
                box_sum += quality * (1 - overlap / union + (hull - union) / hull)
                quality_sum += quality
                logit = flat[level]["centerness"][image, position].item()
                p = 1 / (1 + math.exp(-logit))
                centerness_sum -= quality * math.log(p) + (1 - quality) * math.log(1 - p)
    assert positives > 3
    weight = classification.get("cls_weight", 1.0)
    assert losses["cls"].item() == pytest.approx(weight * cls_sum / positives, rel=1e-4)
    assert losses["box"].item() == pytest.approx(box_sum / max(quality_sum, 1), rel=1e-4)
    assert losses["centerness"].item() == pytest.approx(centerness_sum / positives, rel=1e-4)


def test_images_without_objects_have_finite_losses_and_gradients() -> None:
    module = predictor()
    losses = module.losses(module(features()), [target_of([]), target_of([])])
    assert losses["box"].item() == 0 and losses["centerness"].item() == 0
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(
    "convention",
    [{}, {"box_activation": "exp"}, {"point_offset": 0.5}, {"score": "product"}, {"centerness_on": "cls"}],
)
def test_decoding_of_one_planted_box(convention: dict[str, str]) -> None:
    module = predictor(**convention)
    raw = [
        {"cls": torch.full((1, CLASSES, *s), -9.0), "box": torch.zeros(1, 4, *s), "centerness": torch.zeros(1, 1, *s)}
        for s in SHAPES
    ]
    raw[1]["cls"][0, 2, 1, 2] = 2.0
    distances = torch.tensor([1.0, 0.5, 1.5, 1.25])
    if convention.get("box_activation") == "exp":
        distances = (distances * 16).log()
    raw[1]["box"][0, :, 1, 2] = distances
    images = ImageBatch(torch.zeros(1, 3, 64, 80), torch.tensor([[64, 80]]), torch.tensor([[128, 240]]))
    (found,) = module.detections(raw, images)
    shift = 8 if "point_offset" in convention else 0
    x, y = 32 + shift, 16 + shift
    box = [x - 16, y - 8, x + 24, y + 20]
    assert found.boxes.tolist() == [pytest.approx([box[0] * 3, box[1] * 2, box[2] * 3, box[3] * 2], rel=1e-5)]
    p = 1 / (1 + math.exp(-2))
    assert found.scores.item() == pytest.approx(p * 0.5 if convention.get("score") == "product" else math.sqrt(p * 0.5))
    assert found.labels.tolist() == [2]


def test_centerness_reads_the_named_tower() -> None:
    cls, reg = features(seed=1), features(seed=2)
    mixed = HeadOutput(cls.cls, reg.reg)
    for tower, source in (("reg", reg), ("cls", cls)):
        module = predictor(centerness_on=tower)
        assert torch.equal(module(mixed)[0]["centerness"], module.centerness(source.cls[0]))


def test_postprocess_clips_suppresses_and_limits() -> None:
    images = ImageBatch(torch.zeros(1, 3, 64, 64), torch.tensor([[50, 60]]), torch.tensor([[50, 60]]))
    boxes = torch.tensor([[[0.0, 0, 20, 20], [1, 1, 21, 21], [-5, -5, 70, 70], [61, 0, 70, 20], [30, 30, 40, 40]]])
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.95, 0.04]])[..., None]
    (found,) = Postprocess(iou_threshold=0.5)([(scores, scores, boxes)], images)
    assert found.boxes.tolist() == [[0, 0, 20, 20], [0, 0, 60, 50]]  # no overlap kept, clipped, nothing on padding
    assert found.scores.tolist() == pytest.approx([0.9, 0.7])
    (few,) = Postprocess(iou_threshold=0.5, max_detections=1)([(scores, scores, boxes)], images)
    assert len(few) == 1


def test_crowded_grid_of_valid_masks() -> None:
    sizes = torch.tensor([[33, 80], [64, 17]])
    masks = valid_masks(sizes, SHAPES, STRIDES)
    assert masks is not None
    assert masks[0].sum((1, 2, 3)).tolist() == [5 * 10, 8 * 3]
    assert masks[1].sum((1, 2, 3)).tolist() == [3 * 5, 4 * 2]
    assert valid_masks(torch.tensor([[64, 80]]), SHAPES, STRIDES) is None


def test_prior() -> None:
    bias = partial(predictor)().cls.bias
    assert bias is not None
    assert bias.tolist() == pytest.approx([-math.log(99)] * CLASSES)


def test_padding_holds_no_detections() -> None:
    """Positions on padding score 1 and their boxes reach into the image; none of them is a detection."""
    predictor = FCOS(8, STRIDES, num_classes=CLASSES)
    image = torch.tensor([[32, 40]])
    batch = ImageBatch(torch.zeros(1, 3, 64, 80), image, image)
    valid = valid_masks(image, SHAPES, STRIDES)
    assert valid is not None
    raw = [
        {
            "cls": torch.where(on_image, -20.0, 20.0).expand(1, CLASSES, *shape).clone(),
            "box": torch.full((1, 4, *shape), 9.0),
            "centerness": torch.full((1, 1, *shape), 20.0),
        }
        for on_image, shape in zip(valid, SHAPES, strict=True)
    ]
    assert len(predictor.detections(raw, batch)[0]) > 0
    assert len(predictor.detections(raw, batch, valid)[0]) == 0


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_labels_outside_the_classes_are_named(label: int) -> None:
    """Counting labels from 1 is a common mistake; the last class would quietly be background."""
    predictor = FCOS(8, STRIDES, num_classes=CLASSES)
    raw = predictor(HeadOutput(*[[torch.zeros(1, 8, *shape) for shape in SHAPES]] * 2))
    target = Target(torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([label]), torch.tensor([False]))
    with pytest.raises(ValueError, match=r"0\.\.2"):
        predictor.losses(raw, [target])
