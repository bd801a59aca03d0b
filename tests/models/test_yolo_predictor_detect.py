"""What the YOLO predictor computes and finds: its last convolutions, decoding, detections, configurations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import yolo_oracles as oracle
from torch import Tensor, nn
from yolo_oracles import ANCHORS, CANVAS, STRIDES, YoloScene, random_preds

from dyndet import build_detector
from dyndet.cli.compose import build, compose_experiment
from dyndet.models.fuse import fused
from dyndet.models.predictors.implicit import ImplicitConv
from dyndet.models.predictors.postprocess import Postprocess
from dyndet.models.predictors.yolo_predictor import YoloPredictor
from dyndet.structures import Detections, HeadOutput, ImageBatch, Target

P5 = "yolo_p5"
P6 = "yolo_p6"


def predictor(classes: int = 2, **kwargs: Any) -> YoloPredictor:
    torch.manual_seed(0)
    return YoloPredictor(**{"channels": 4, "strides": STRIDES, "num_classes": classes, "anchors": ANCHORS, **kwargs})


def configured(name: str, *overrides: str) -> YoloPredictor:
    config = compose_experiment(None, [f"predictor={name}", *overrides])
    strides = [8, 16, 32, 64] if name == P6 else [8, 16, 32]
    return build(config.predictor)(channels=[8 * (level + 1) for level in range(len(strides))], strides=strides)


def images(*sizes: tuple[int, int], canvas: tuple[int, int] = CANVAS) -> ImageBatch:
    return ImageBatch(torch.zeros(len(sizes), 3, *canvas), torch.tensor(sizes), torch.tensor(sizes))


# The last convolutions


def test_implicit_vectors_fold_into_the_convolution() -> None:
    torch.manual_seed(0)
    conv = ImplicitConv(6, 9).double()
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    by_hand = conv.scale * (nn.functional.conv2d(x + conv.add, conv.conv.weight, conv.conv.bias))
    plain = conv.fused()
    assert type(plain) is nn.Conv2d and plain.weight.dtype == torch.float64
    assert torch.equal(conv(x), by_hand)
    assert torch.allclose(plain(x), by_hand, rtol=0, atol=1e-12)
    assert not torch.allclose(conv.conv(x), by_hand, atol=1e-3)
    with torch.no_grad():
        plain.weight.zero_()
    assert torch.equal(conv(x), by_hand)


def test_a_fused_predictor_has_plain_convolutions() -> None:
    module = predictor().double()
    features = [torch.randn(2, 4, CANVAS[0] // s, CANVAS[1] // s).double() for s in STRIDES]
    plain = fused(module)
    assert all(type(conv) is nn.Conv2d for conv in plain.convs)
    pairs = zip(module(HeadOutput(features, [])), plain(HeadOutput(features, [])), strict=True)
    assert all(torch.allclose(a["pred"], b["pred"], rtol=0, atol=1e-12) for a, b in pairs)
    assert all(isinstance(conv, ImplicitConv) for conv in module.convs)


def test_implicit_vectors_start_near_nothing() -> None:
    torch.manual_seed(0)
    conv = ImplicitConv(4000, 4000)
    for vector, mean in ((conv.add, 0.0), (conv.scale, 1.0)):
        assert vector.mean().item() == pytest.approx(mean, abs=2e-3) and vector.std().item() == pytest.approx(
            0.02, rel=0.05
        )


@pytest.mark.parametrize(
    ("widths", "numbers"), [((256, 512, 1024), 36_907_898 - 36_905_341), ((320, 640, 1280), 71_314_746 - 71_311_741)]
)
def test_published_numbers_of_implicit_vectors(widths: tuple[int, ...], numbers: int) -> None:
    """Published are the parameters of fused YOLOv7 and YOLOv7-X with the vectors and of those deployed without."""
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in predictor(80, channels=widths, implicit=implicit).parameters())
            for implicit in (True, False)
        ]
    assert sizes[0] - sizes[1] == numbers


@pytest.mark.parametrize("implicit", [True, False])
def test_maps(implicit: bool) -> None:
    module = predictor(channels=[4, 6, 8], implicit=implicit).double()
    features = [
        torch.randn(2, c, CANVAS[0] // s, CANVAS[1] // s).double() for c, s in zip([4, 6, 8], STRIDES, strict=True)
    ]
    raw = module(HeadOutput(features, []))
    for level, conv, x, stride in zip(raw, module.convs, features, STRIDES, strict=True):
        assert list(level) == ["pred"] and level["pred"].shape == (2, 3, CANVAS[0] // stride, CANVAS[1] // stride, 7)
        out = conv(x)  # channels run anchor by anchor
        assert torch.equal(level["pred"][1, 2, 1, 0], out[1, 14:21, 1, 0])


def test_initial_biases() -> None:
    """Eight objects per image of 640, and classes at 0.6 in K, on top of the default start."""
    module = predictor(80, channels=[2_500] * 3, implicit=False)  # default biases lie within 0.02
    for conv, stride in zip(module.convs, STRIDES, strict=True):
        bias = conv.bias.view(3, 85)  # type: ignore[union-attr]
        assert bias[:, 4].tolist() == [pytest.approx(math.log(8 / (640 / stride) ** 2), abs=0.021)] * 3
        assert bias[:, :4].abs().max() < 0.021 and bias.std() > 0.1
        assert bias[:, 5:].flatten().tolist() == pytest.approx([math.log(0.6 / 79.01)] * 240, abs=0.021)
    torch.manual_seed(0)
    default = nn.Conv2d(2_500, 255, 1).bias
    first = predictor(80, channels=[2_500] * 3, implicit=False).convs[0].bias
    added = (first - default).view(3, 85)  # type: ignore[operator]
    assert torch.allclose(added[:, :4], torch.zeros(3, 4))
    assert torch.allclose(added[:, 4], torch.tensor(math.log(8 / 80**2)), rtol=0, atol=1e-5)
    assert predictor(1).convs[0].conv.bias.view(3, 6)[:, 5].mean().item() == pytest.approx(math.log(60), abs=0.5)  # type: ignore[union-attr]


def test_anchors_are_in_the_checkpoint() -> None:
    state = predictor().state_dict()
    other = predictor(anchors=[[(1.0, 1.0)] * 3] * 3)
    other.load_state_dict(state)
    assert torch.equal(other.anchors, torch.tensor(ANCHORS))


# Decoding


def test_zero_logits_are_the_anchor_in_the_centre_of_the_cell() -> None:
    raw = [{"pred": torch.zeros_like(level["pred"])} for level in random_preds(1, 2)]
    rows = predictor().decode(raw)[0]
    expected = [
        [(j + 0.5) * stride, (i + 0.5) * stride, *anchor, 0.5, 0.5, 0.5]
        for stride, anchors in zip(STRIDES, ANCHORS, strict=True)
        for anchor in anchors
        for i in range(CANVAS[0] // stride)
        for j in range(CANVAS[1] // stride)
    ]
    assert torch.equal(rows, torch.tensor(expected))


def test_decoding() -> None:
    raw = random_preds(2, 3, seed=4, spread=2.0)
    rows = predictor(3).decode(raw)
    expected = [
        [
            [*oracle.decode(row, j, i, ANCHORS[level][a], STRIDES[level]), *(oracle.sigmoid(v) for v in row[4:])]
            for level, maps in enumerate(oracle.numbers(raw))
            for a, grid in enumerate(maps[image])
            for i, line in enumerate(grid)
            for j, row in enumerate(line)
        ]
        for image in range(2)
    ]
    assert rows.dtype == torch.float32 and torch.allclose(
        rows.double(), torch.tensor(expected).double(), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize(("name", "side", "number"), [(P5, 640, 25_200), (P6, 1280, 102_000)])
def test_published_numbers_of_predictions(name: str, side: int, number: int) -> None:
    module = configured(name, "data.num_classes=1")
    raw = [{"pred": torch.zeros(1, 3, side // stride, side // stride, 6)} for stride in module.strides]
    rows = module.decode(raw)
    assert rows.shape == (1, number, 6)
    assert rows[0, 0].tolist() == [4, 4, *module.anchors[0, 0].tolist(), 0.5, 0.5]
    last = module.strides[-1] / 2
    assert rows[0, -1].tolist() == [side - last, side - last, *module.anchors[-1, -1].tolist(), 0.5, 0.5]


# Detections


def plant(classes: int, *rows: tuple[int, int, int, int, list[float]]) -> list[dict[str, Tensor]]:
    """Maps that say nothing but at some level, anchor, row and column: objectness and classes, as probabilities."""
    raw = [{"pred": torch.full_like(level["pred"], -20.0)} for level in random_preds(1, classes)]
    for level, a, i, j, chances in rows:
        raw[level]["pred"][0, a, i, j] = torch.cat([torch.zeros(4), torch.tensor(chances).logit()])
    return raw


def found_in(module: YoloPredictor, raw: list[dict[str, Tensor]], size: tuple[int, int] = CANVAS) -> Detections:
    (found,) = module.detections(raw, images(size), YoloScene([size], [], 1).valid())
    return found


def test_scores_are_objectness_times_class_for_every_class() -> None:
    raw = plant(2, (0, 1, 3, 4, [0.8, 0.5, 0.25]), (1, 2, 1, 1, [0.5, 0.001, 0.9]))
    found = found_in(predictor(), raw)
    assert found.scores.tolist() == pytest.approx([0.45, 0.4, 0.2]) and found.labels.tolist() == [1, 0, 1]
    small = [36 - 7.0, 28 - 11.0, 36 + 7.0, 28 + 11.0]
    expected = torch.tensor([[24 - 15.0, 0.0, 24 + 15.0, 24 + 25.0], small, small])
    assert torch.allclose(found.boxes, expected, atol=1e-4)


def test_a_single_class_scores_by_objectness_alone() -> None:
    raw = plant(1, (0, 1, 3, 4, [0.8, 0.1]), (1, 2, 1, 1, [0.002, 0.9]), (2, 0, 0, 0, [0.0005, 0.9]))
    assert found_in(predictor(1), raw).scores.tolist() == pytest.approx([0.8, 0.002])


def test_overlaps_and_numbers() -> None:
    """Boxes of one class that overlap by more than 0.65 go; candidates are limited over all levels, not per level."""
    chances = [[0.9, 0.9], [0.8, 0.9], [0.7, 0.9], [0.6, 0.9]]
    raw = plant(
        1,
        *(
            (level, 0, i, j, c)
            for (level, i, j), c in zip(((0, 1, 1), (0, 6, 9), (1, 1, 4), (2, 1, 1)), chances, strict=True)
        ),
    )
    assert len(found_in(predictor(1), raw)) == 4
    one = Postprocess(score_threshold=0.001, topk=3, iou_threshold=0.65, max_detections=300, clip="after")
    assert found_in(predictor(1, postprocess=one), raw).scores.tolist() == pytest.approx([0.9, 0.8, 0.7])
    for shift, number in ((2.0, 1), (3.5, 2)):  # boxes of 14 x 22, so many pixels apart: IoU 0.75 and 0.6
        raw = plant(1, (0, 1, 3, 4, [0.9, 0.9]), (0, 1, 3, 5, [0.8, 0.9]))
        raw[0]["pred"][0, 1, 3, 5, 0] = torch.tensor(shift / 16).logit()
        assert len(found_in(predictor(1), raw)) == number


def test_padding_does_not_detect() -> None:
    raw = plant(
        1, (0, 0, 1, 1, [0.9, 0.9]), (0, 1, 4, 1, [0.8, 0.9]), (1, 0, 1, 4, [0.7, 0.9]), (2, 0, 0, 0, [0.6, 0.9])
    )
    size = (32, 64)
    found = found_in(predictor(1), raw, size)
    assert found.scores.tolist() == pytest.approx([0.9, 0.6])
    free = [level["pred"][..., 4].sigmoid().amax().item() for level in raw]
    assert free == pytest.approx([0.9, 0.7, 0.6])
    kept = found_in(predictor(1, ignore_padding=False), raw, size).scores.tolist()
    assert kept == pytest.approx([0.9, 0.8, 0.7, 0.6])  # their boxes reach into the image
    cropped = [{"pred": level["pred"][:, :, : 32 // s, : 64 // s]} for level, s in zip(raw, STRIDES, strict=True)]
    (alone,) = predictor(1).detections(cropped, images(size, canvas=size))
    assert torch.equal(alone.boxes, found.boxes) and torch.equal(alone.scores, found.scores)


def test_each_image_has_its_own_detections() -> None:
    raw = random_preds(3, 2)
    module = predictor()
    with torch.no_grad():
        together = module.detections(raw, images(CANVAS, CANVAS, CANVAS))
        for index, found in enumerate(together):
            (alone,) = module.detections([{"pred": level["pred"][index : index + 1]} for level in raw], images(CANVAS))
            assert torch.equal(alone.boxes, found.boxes) and torch.equal(alone.labels, found.labels)
            assert 20 < len(found) <= 300


# Configurations


@pytest.mark.parametrize("name", [P5, P6])
def test_presets(name: str) -> None:
    module = configured(name, "data.num_classes=9")
    first, last = {P5: ([12, 16], [459, 401]), P6: ([19, 27], [925, 792])}[name]
    assert module.anchors[0, 0].tolist() == first and module.anchors[-1, -1].tolist() == last
    assert module.anchors.shape == (len(module.strides), 3, 2) and module.num_classes == 9
    assert module.gains["obj"] == pytest.approx({P5: 0.7, P6: 2.1}[name])
    assert (module.anchor_ratio, module.topk, module.assignment, module.times_batch) == (4.0, 10, "ota", True)
    published = {
        "score_threshold": 0.001,
        "topk": 30_000,
        "iou_threshold": 0.65,
        "max_detections": 300,
        "clip": "after",
    }
    for post in (module.postprocess, predictor().postprocess):
        assert {key: getattr(post, key) for key in published} == published
    assert all(isinstance(conv, ImplicitConv) for conv in module.convs)


def test_it_learns_and_detects_behind_any_pyramid() -> None:
    torch.manual_seed(0)
    overrides = ["head=none", "predictor=yolo_p5_small", "neck.channels=16", "backbone.weights=none"]
    detector = build_detector(None, overrides)
    assert isinstance(detector.predictor, YoloPredictor)
    boxes = torch.tensor([[4.0, 6, 26, 30], [34, 30, 60, 58]])
    pictures = [torch.full((3, 64, 64), 0.5), torch.full((3, 48, 56), 0.5)]
    for box, value in zip(boxes.int().tolist(), (1.0, 0.0), strict=True):
        pictures[0][:, box[1] : box[3], box[0] : box[2]] = value
    targets = [
        Target(boxes, torch.tensor([0, 1]), torch.tensor([False, False])),
        Target(torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0).bool()),
    ]
    trained = [p for p in detector.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    totals = []
    detector.train()
    for _ in range(15):
        losses = detector.losses(pictures, targets)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        totals.append(losses.total.item())
    assert all(p.grad is not None for p in trained)
    assert totals[-1] < 0.8 * totals[0], totals
    detector.eval()
    found = detector.detect(pictures)
    assert all(len(item) <= 300 and item.scores.isfinite().all() for item in found)
    assert not len(found[1]) or (found[1].boxes[:, 2].max() <= 56 and found[1].boxes[:, 3].max() <= 48)
