"""Matches, curves and thresholds against pycocotools and against counting one by one."""

from __future__ import annotations

import contextlib
import copy
import io
import math

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_coco_ap import CATEGORIES, Listed, scene
from torchvision.ops import box_iou

from dyndet.metrics.average_precision import CocoMetric
from dyndet.metrics.curves import RECALLS, class_curve, curve_of
from dyndet.metrics.export import to_coco_json, write_ground_truth
from dyndet.metrics.matching import match
from dyndet.structures import Detections, Target

IOUS = np.linspace(0.5, 0.95, 10)


def judged(detections: list[Detections], targets: list[Target]) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(write_ground_truth(Listed(targets)))
        coco.createIndex()
        judge = COCOeval(coco, coco.loadRes(to_coco_json(detections, targets, CATEGORIES)), "bbox")
        judge.evaluate()
        judge.accumulate()
    return judge


@pytest.mark.parametrize("seed", range(3))
def test_precision_at_every_recall_iou_and_class_is_cocos(seed: int) -> None:
    detections, targets = scene(seed)
    expected = judged(detections, targets).eval["precision"][:, :, :, 0, 2]
    found = []
    for index, iou in enumerate(IOUS):
        matches = match(detections, targets, 3, iou=iou)
        for label in range(3):
            curve = class_curve(matches, label)
            assert curve.interpolated() == pytest.approx(expected[index, :, label], abs=1e-9)
            found.append(curve.average_precision())
    metric = CocoMetric(CATEGORIES)
    metric.update(detections, targets)
    values = metric.compute()  # in float32
    assert np.mean(found) == pytest.approx(values["AP"], abs=1e-7)
    assert np.mean(found[:3]) == pytest.approx(values["AP50"], abs=1e-7)


def by_hand(detections: list[Detections], targets: list[Target], label: int, threshold: float) -> tuple[int, int, int]:
    """Right and wrong detections of a class from a score on, and its objects; without crowds."""
    right = wrong = objects = 0
    for found, target in zip(detections, targets, strict=True):
        theirs = target.boxes[target.labels == label]
        objects += len(theirs)
        free = list(range(len(theirs)))
        for index in range(len(found.scores)):
            if found.labels[index] != label or found.scores[index].item() < threshold:
                continue
            shared = {i: float(box_iou(found.boxes[index][None].double(), theirs[i][None].double())) for i in free}
            best = max(shared, key=lambda i: shared[i], default=None)
            if best is not None and shared[best] >= 0.5:
                free.remove(best)
                right += 1
            else:
                wrong += 1
    return right, wrong, objects


@pytest.mark.parametrize("seed", range(2))
def test_f1_at_thresholds_equals_counting(seed: int) -> None:
    detections, targets = scene(seed, images=8)
    targets = [target.without_crowd() for target in targets]
    matches = match(detections, targets, 3)
    scores = sorted({score for found in detections for score in found.scores.tolist()})
    for label in range(3):
        curve = class_curve(matches, label)
        expected = {}
        for threshold in [0.0, *scores, 1.1]:
            right, wrong, objects = by_hand(detections, targets, label, threshold)
            expected[threshold] = 2 * right / (right + wrong + objects)
        assert curve.f1_at(np.array(list(expected))) == pytest.approx(list(expected.values()), abs=1e-12)
        best = curve.best()
        assert best.f1 == pytest.approx(max(expected.values())) and best.threshold in scores
        right, wrong, objects = by_hand(detections, targets, label, best.threshold)
        assert (best.precision, best.recall) == pytest.approx((right / (right + wrong), right / objects))


def test_equal_scores_stand_or_fall_together() -> None:
    best = curve_of(np.array([True, False]), np.array([0.5, 0.5]), 1).best()
    assert (best.threshold, best.precision, best.recall) == (0.5, 0.5, 1.0)


def test_classes_without_objects_or_detections() -> None:
    none = curve_of(np.zeros(0, bool), np.zeros(0), 3)
    assert none.average_precision() == 0 and none.best().threshold == 1 and none.f1_at(np.array([0.0, 0.5])).sum() == 0
    wrong = curve_of(np.zeros(2, bool), np.array([0.9, 0.1]), 0)
    assert math.isnan(wrong.average_precision()) and wrong.best().f1 == 0
    assert len(RECALLS) == len(none.interpolated()) == 101


def test_no_more_than_a_hundred_detections_of_a_class_count() -> None:
    box = torch.tensor([[0.0, 0, 10, 10]])
    target = Target(box, torch.tensor([0]), torch.tensor([False]), original_size=(20, 20))
    elsewhere = torch.tensor([[10.0, 10, 20, 20]]).repeat(100, 1)
    found = Detections(torch.cat([elsewhere, box]), torch.linspace(0.9, 0.1, 101), torch.zeros(101).long())
    assert len(match([found], [target], 1).score) == 100 and (match([found], [target], 1).found < 0).all()
