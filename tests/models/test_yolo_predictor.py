"""The losses of the YOLO predictor against loops in float64, and what must hold of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import yolo_oracles as oracle
from anchor_oracles import AmbiguousError, target_of
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor
from yolo_oracles import ANCHORS, CANVAS, STRIDES, YoloScene, random_preds, yolo_scenes

from dyndet.models.predictors.yolo_loss import complete_iou
from dyndet.models.predictors.yolo_predictor import YoloPredictor
from dyndet.structures import HeadOutput, Target

Raw = list[dict[str, Tensor]]

BUSY = [
    target_of([[3.1, 4.2, 33.3, 38.4], [20.2, 10.6, 52.1, 40.8], [20.2, 10.6, 52.1, 40.8]], [1, 0, 1]),
    target_of([[10.0, 10.0, 18.0, 19.0], [0.0, 0.0, 96.0, 64.0]], [0, 1]),
    target_of([]),
]


def predictor(classes: int = 2, **kwargs: Any) -> YoloPredictor:
    torch.manual_seed(0)
    return YoloPredictor(**{"channels": 4, "strides": STRIDES, "num_classes": classes, "anchors": ANCHORS, **kwargs})


def plain(classes: int = 2, **kwargs: Any) -> YoloPredictor:
    """Gains and balance of 1: the bare sums over levels."""
    gains = {"box_gain": 1.0, "obj_gain": 1.0, "cls_gain": 80 / classes, "image_size": 640}
    return predictor(classes, **{**gains, "times_batch": False, **kwargs})


def values(losses: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in losses.items()}


def near(module: YoloPredictor, raw: Raw, target: Target, image: int = 0) -> None:
    """Lets the predictions come close to the objects, so that they overlap and several are chosen."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for level, stride, anchors in zip(raw, STRIDES, ANCHORS, strict=True):
            for box in target.boxes.tolist():
                x, y, w, h = oracle.split(box)
                for a, anchor in enumerate(anchors):
                    ratio = torch.tensor([w / anchor[0], h / anchor[1]])
                    rows, columns = level["pred"].shape[2:4]
                    for i in range(max(int(y / stride - 0.5), 0), min(int(y / stride + 0.5) + 1, rows)):
                        for j in range(max(int(x / stride - 0.5), 0), min(int(x / stride + 0.5) + 1, columns)):
                            share = (torch.tensor([x, y]) / stride - torch.tensor([j, i]) + 0.5) / 2
                            both = torch.cat([share, ratio.sqrt() / 2]).clamp(0.02, 0.98).logit()
                            level["pred"][image, a, i, j, :4] = both + 0.3 * torch.randn(4, generator=generator)


@settings(max_examples=80, deadline=None)
@given(yolo_scenes(), st.booleans(), st.booleans(), st.sampled_from([3, 10]), st.booleans())
def test_losses(scene: YoloScene, ota: bool, ignore: bool, topk: int, close: bool) -> None:
    module = plain(scene.classes, assignment="ota" if ota else "candidates", ignore_padding=ignore, topk=topk)
    raw = scene.raw()
    if close:
        for image, target in enumerate(scene.targets):
            near(module, raw, target, image)
    try:
        expected = oracle.expected_losses(scene, raw, ota=ota, topk=topk, ignore=ignore)
    except AmbiguousError:
        reject()
    losses = module.losses(raw, scene.targets, scene.valid())
    assert all(value.shape == () and value.dtype == torch.float32 for value in losses.values())
    assert values(losses) == pytest.approx(expected, rel=2e-5, abs=1e-6)


def test_the_oracle_meets_duplicates_and_conflicts() -> None:
    """Two objects in one cell propose it twice, and both entries may stay: the later one sets the objectness."""
    target = target_of([[20.0, 14.0, 44.0, 42.0], [20.5, 14.5, 43.5, 41.0]], [0, 1])
    scene = YoloScene([CANVAS], [target], 2, 119)
    raw = scene.raw()
    near(plain(), raw, target)
    places = oracle.propose(scene.boxes()[0], CANVAS)
    kept = oracle.match(oracle.numbers(raw), 0, scene.boxes()[0], scene.labels()[0], places, 10)
    cells = [place[:4] for place in kept]
    assert len(set(cells)) < len(cells), "no cell is in the list twice"
    owners = {cell: {place[4] for place in kept if place[:4] == cell} for cell in cells}
    assert any(len(both) == 2 for both in owners.values()), "no cell has two owners"
    expected = oracle.expected_losses(scene, raw)
    assert values(plain().losses(raw, scene.targets)) == pytest.approx(expected, rel=1e-5)


def test_an_order_of_matches_decides_the_objectness() -> None:
    """All candidates of two objects in the same places: the objectness wanted is that of the one that comes later."""
    first, second = [20.0, 14.0, 44.0, 42.0], [22.0, 16.0, 42.0, 40.0]
    raw = random_preds(1, 2, seed=1)
    module = plain(assignment="candidates")
    a, b = (values(module.losses(raw, [target_of(boxes, [0, 0])])) for boxes in ([first, second], [second, first]))
    alone = values(module.losses(raw, [target_of([second], [0])]))
    assert a["box"] == pytest.approx(b["box"], rel=1e-6) and a["cls"] == pytest.approx(b["cls"], rel=1e-6)
    assert a["obj"] == pytest.approx(alone["obj"], rel=1e-6) and abs(a["obj"] - b["obj"]) > 1e-4


def test_gains() -> None:
    """Published for W6 at 1280 with 80 classes: box 0.0375, cls 0.225, obj 2.1; for three levels at 640 as given."""
    four: dict[str, Any] = {"strides": [8, 16, 32, 64], "anchors": [*ANCHORS, ANCHORS[-1]]}
    w6 = predictor(80, image_size=1280, **four)
    assert w6.gains == pytest.approx({"box": 0.0375, "cls": 0.225, "obj": 2.1})
    assert predictor(80).gains == pytest.approx({"box": 0.05, "cls": 0.3, "obj": 0.7})
    assert predictor(20).gains["cls"] == pytest.approx(0.075)
    assert w6.balance == oracle.BALANCE[4] and predictor().balance == oracle.BALANCE[3]


def test_gains_balance_and_batch_multiply() -> None:
    raw = random_preds(3, 2)
    bare = values(plain().losses(raw, BUSY))
    module = predictor(image_size=320)
    found = values(module.losses(raw, BUSY))
    assert found == pytest.approx({name: 3 * bare[name] * module.gains[name] for name in bare}, rel=1e-5)
    assert predictor().losses(raw, [target_of([])] * 3)["obj"].item() == pytest.approx(
        3 * 0.7 * plain().losses(raw, [target_of([])] * 3)["obj"].item(), rel=1e-5
    )
    levels = [
        plain(balance=[float(n == level) for n in range(3)]).losses(raw, BUSY)["obj"].item() for level in range(3)
    ]
    assert bare["obj"] == pytest.approx(4 * levels[0] + levels[1] + 0.4 * levels[2], rel=1e-5)


def test_losses_grow_with_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of several processes are averaged: the batch that losses are multiplied by is the whole one."""
    module, raw = predictor(), random_preds(3, 2)
    alone = values(module.losses(raw, BUSY))
    monkeypatch.setattr("dyndet.models.predictors.yolo_predictor.world_size", lambda: 8)
    assert values(module.losses(raw, BUSY)) == {name: pytest.approx(8 * value) for name, value in alone.items()}


def test_losses_are_of_so_many_images_where_batches_accumulate() -> None:
    raw = random_preds(3, 2)
    one, alone = values(predictor(times_batch=False).losses(raw, BUSY)), values(predictor().losses(raw, BUSY))
    assert alone == {name: pytest.approx(3 * value) for name, value in one.items()}
    found = values(predictor(times_batch=128).losses(raw, BUSY))
    assert found == {name: pytest.approx(128 * value) for name, value in one.items()}


def test_without_objects_only_objectness_trains() -> None:
    raw = [{"pred": torch.zeros_like(level["pred"]).requires_grad_()} for level in random_preds(2, 2)]
    losses = predictor().losses(raw, [target_of([])] * 2)
    assert losses["box"].item() == 0 and losses["cls"].item() == 0
    assert losses["obj"].item() == pytest.approx(2 * 0.7 * 5.4 * math.log(2), rel=1e-5)
    torch.stack(list(losses.values())).sum().backward()
    for level in raw:
        grad = level["pred"].grad
        assert grad is not None and bool((grad[..., 4] > 0).all()) and not grad[..., [0, 1, 2, 3, 5, 6]].any()


def test_one_class_is_not_classified() -> None:
    raw = random_preds(1, 1)
    losses = predictor(1).losses(raw, [target_of([[10.0, 10, 40, 50]])])
    assert losses["cls"].item() == 0 and losses["box"].item() > 0
    torch.stack(list(losses.values())).sum().backward()
    assert all(level["pred"].grad is not None and not level["pred"].grad[..., 5].any() for level in raw)


def test_repeated_images_leave_the_means() -> None:
    raw = random_preds(3, 2)
    twice = [{"pred": level["pred"].repeat(2, 1, 1, 1, 1)} for level in raw]
    assert values(plain().losses(twice, BUSY * 2)) == pytest.approx(values(plain().losses(raw, BUSY)), rel=1e-5)
    doubled = {name: 2 * value for name, value in values(predictor().losses(raw, BUSY)).items()}
    assert values(predictor().losses(twice, BUSY * 2)) == pytest.approx(doubled, rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(4)), st.integers(0, 99))
def test_the_order_of_objects_does_not_matter(order: list[int], seed: int) -> None:
    """Objects so far apart that no two of them share a place."""
    boxes = torch.tensor([[2.0, 3, 21, 25], [60, 4, 90, 30], [4, 40, 30, 62], [40, 40, 84, 61]])
    labels = torch.tensor([0, 1, 1, 0])
    crowd = torch.zeros(4, dtype=torch.bool)
    raw = random_preds(1, 2, seed=seed)
    for assignment in ("ota", "candidates"):
        module = plain(assignment=assignment)
        losses = values(module.losses(raw, [Target(boxes, labels, crowd)]))
        turned = values(module.losses(raw, [Target(boxes[order], labels[order], crowd)]))
        assert turned == pytest.approx(losses, rel=1e-5)


def test_width_and_height_are_alike() -> None:
    """A picture turned about its diagonal has the same losses: x belongs to the width, y to the height."""
    raw = random_preds(3, 2)
    swapped = [{"pred": level["pred"].transpose(2, 3)[..., [1, 0, 3, 2, 4, 5, 6]]} for level in raw]
    anchors = [[(h, w) for w, h in level] for level in ANCHORS]
    targets = [Target(target.boxes[:, [1, 0, 3, 2]], target.labels, target.crowd) for target in BUSY]
    losses = values(plain().losses(raw, BUSY))
    assert values(plain(anchors=anchors).losses(swapped, targets)) == pytest.approx(losses, rel=1e-5)


SMALL = (32, 64)
WITHIN = [
    target_of([[3.1, 4.2, 26.3, 30.4], [8.2, 1.6, 61.1, 31.8]], [1, 0]),
    target_of([[50.0, 20.0, 63.9, 31.9]], [1]),
]


@pytest.mark.parametrize("assignment", ["ota", "candidates"])
def test_padding_equals_cropping(assignment: str) -> None:
    raw = random_preds(2, 2)
    cropped = [
        {"pred": level["pred"][:, :, : SMALL[0] // stride, : SMALL[1] // stride]}
        for level, stride in zip(raw, STRIDES, strict=True)
    ]
    valid = YoloScene([SMALL] * 2, WITHIN, 2).valid()
    assert valid is not None
    with torch.no_grad():
        for level, mask in zip(raw, valid, strict=True):
            level["pred"].copy_(torch.where(mask[..., None], level["pred"], torch.nan))
    module = plain(assignment=assignment)
    padded, alone = module.losses(raw, WITHIN, valid), module.losses(cropped, WITHIN)
    assert values(padded) == pytest.approx(values(alone), rel=1e-6)
    torch.stack(list(padded.values())).sum().backward()
    for level, mask in zip(raw, valid, strict=True):
        assert level["pred"].grad is not None and not level["pred"].grad[~mask.expand(-1, 3, -1, -1)].any()


def test_padding_counts_where_it_is_not_ignored_and_none_is_all_valid() -> None:
    raw = random_preds(2, 2)
    valid = YoloScene([SMALL] * 2, WITHIN, 2).valid()
    full = [torch.ones(2, 1, *level["pred"].shape[2:4], dtype=torch.bool) for level in raw]
    free = values(plain().losses(raw, WITHIN))
    assert values(plain(ignore_padding=False).losses(raw, WITHIN, valid)) == free
    assert values(plain().losses(raw, WITHIN, full)) == pytest.approx(free, rel=1e-6)
    assert values(plain().losses(raw, WITHIN, valid))["obj"] != pytest.approx(free["obj"], rel=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_complete_iou(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(40, 2, 4, generator=generator, dtype=torch.float64) * 3 + 0.01
    boxes[:10, 1] = boxes[:10, 0]  # the same box
    boxes[10:13, 0, 2] = 1e-5  # almost a line
    found = complete_iou(boxes[:, 0, :2], boxes[:, 0, 2:], boxes[:, 1, :2], boxes[:, 1, 2:])
    expected = [oracle.complete_iou(*pair) for pair in boxes.tolist()]
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_small_numbers_in_complete_iou_are_where_they_were() -> None:
    """Boxes so small that 1e-7 shows in heights, union, diagonal and ratios."""
    boxes = torch.tensor([[[0.0, 0, 1e-4, 2e-7], [3e-5, 1e-8, 2e-4, 1e-7]]], dtype=torch.float64)
    found = complete_iou(boxes[:, 0, :2], boxes[:, 0, 2:], boxes[:, 1, :2], boxes[:, 1, 2:])
    assert found.item() == pytest.approx(oracle.complete_iou(*boxes[0].tolist()), rel=1e-9)


def test_the_weight_of_the_aspect_ratio_has_no_gradient() -> None:
    size = torch.tensor([[2.0, 1.0]], dtype=torch.float64, requires_grad=True)
    centre, wanted = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[1.0, 1.5]], dtype=torch.float64)
    complete_iou(centre, size, centre, wanted).sum().backward()
    assert size.grad is not None

    def fixed(w: float, h: float, weight: float | None = None) -> float:
        inner = min(w, 1.0) * min(h, 1.5)
        overlap = inner / (w * h + 1.5 - inner)
        v = 4 / math.pi**2 * (math.atan(1 / 1.5) - math.atan(w / h)) ** 2
        return overlap - (v / (1 - overlap + v) if weight is None else weight) * v

    overlap = 1.0 / 2.5
    v = 4 / math.pi**2 * (math.atan(1 / 1.5) - math.atan(2)) ** 2
    weight, step = v / (1 - overlap + v), 1e-6
    slope = [
        (fixed(2 + step, 1, weight) - fixed(2 - step, 1, weight)) / (2 * step),
        (fixed(2, 1 + step, weight) - fixed(2, 1 - step, weight)) / (2 * step),
    ]
    assert size.grad[0].tolist() == pytest.approx(slope, rel=1e-5)
    assert (fixed(2 + step, 1) - fixed(2 - step, 1)) / (2 * step) != pytest.approx(slope[0], rel=1e-2)


def test_the_wanted_objectness_has_no_gradient() -> None:
    raw = random_preds(1, 2)
    predictor().losses(raw, BUSY[:1])["obj"].backward()
    for level in raw:
        assert level["pred"].grad is not None and not level["pred"].grad[..., :4].any()


@pytest.mark.parametrize("spread", [0.0, 80.0, -80.0, None])
@pytest.mark.parametrize("classes", [1, 2])
def test_gradients_stay_finite(spread: float | None, classes: int) -> None:
    raw = random_preds(4, classes)
    with torch.no_grad():
        for level in raw:
            value = level["pred"]
            value.copy_(80 * value.sign() if spread is None else torch.full_like(value, spread))
    odd = target_of([[10.0, 10, 11, 11], [20.0, 20, 20, 20], [0.0, 0, 30, 0], [90.0, 60, 200, 99], [-40.0, -30, 2, 2]])
    targets = [Target(item.boxes, item.labels.clamp(max=classes - 1), item.crowd) for item in [*BUSY, odd]]
    losses = predictor(classes).losses(raw, targets)
    assert all(value.isfinite() for value in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert all(level["pred"].grad is not None and level["pred"].grad.isfinite().all() for level in raw)


def test_losses_are_float32_under_autocast() -> None:
    module = predictor()
    features = [torch.randn(3, 4, CANVAS[0] // s, CANVAS[1] // s) * 30 for s in STRIDES]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        raw = module.train()(HeadOutput(features, features))
        losses = module.losses(raw, BUSY)
    exact = module.losses([{"pred": level["pred"].float()} for level in raw], BUSY)
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert values(losses) == pytest.approx(values(exact), rel=1e-6)
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_labels_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.1"):
        predictor().losses(random_preds(1, 2), [target_of([[0.0, 0, 9, 9]], [2])])


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"channels": [4, 4]}, "channels are given for 2 levels, but strides for 3"),
        ({"anchors": ANCHORS[:2]}, "anchors are given for 2 levels"),
        ({"balance": [1.0]}, "balance are given for 1 levels"),
        ({"strides": [8, 16], "anchors": ANCHORS[:2]}, "no balance is published for 2 levels"),
        ({"anchors": [*ANCHORS[:2], ANCHORS[2][:2]]}, "as many pairs"),
        ({"assignment": "all"}, "'ota' or 'candidates', got 'all'"),
    ],
)
def test_parts_that_do_not_fit_are_named(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        predictor(**kwargs)
