"""Accuracy against compute over the splits of a dynamic detector."""

from __future__ import annotations

import math

import pytest
import torch

from dyndet.api import build_detector
from dyndet.metrics.static import StaticCosts
from dyndet.models.detectors.dynamic import DynamicDetector
from dyndet.speeds.set import Calibration, Point
from dyndet.speeds.splits import BothWays, go_both_ways, quantile, spearman
from dyndet.structures import Batch, Category, Detections, ImageBatch, Target


def test_rank_correlation_by_hand() -> None:
    x = torch.tensor([1.0, 5.0, 2.0, 9.0])
    assert spearman(x, x.exp()) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)
    # Without ties 1 - 6 sum d^2 / (n (n^2 - 1)): ranks 1 3 2 4 against 2 1 4 3.
    assert spearman(x, torch.tensor([20.0, 10.0, 40.0, 30.0])) == pytest.approx(1 - 6 * (1 + 4 + 4 + 1) / 60)
    # Ties share their rank: 1.5 1.5 3 against 1 2 3.
    assert spearman(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(math.sqrt(0.75))


def test_thresholds() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    assert quantile(scores, 0) == math.inf and quantile(scores, 1) == -math.inf
    assert quantile(scores, 0.5) == 2 and quantile(scores, 0.6) == pytest.approx(1.6)


def test_splits_are_those_of_published_scores() -> None:
    """These are easiness, the negative: hard lies below a quantile there, above one here, the same images to a tie."""
    easiness = torch.randn(40, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    for fraction in [step / 40 for step in range(1, 40)]:
        published = easiness < float(torch.quantile(easiness.double(), fraction))
        assert torch.equal(-easiness > quantile(-easiness, fraction), published)
    calibration = {"points": [{"threshold": -math.inf, "macs": 1.0}, {"threshold": math.inf, "macs": 2.0}]}
    stored = Calibration.of({**calibration, "easiness": easiness.sort().values.tolist(), "device": "a", "images": 40})
    assert stored.difficulty == (-easiness).sort().values.tolist() and stored.images == 40
    assert [point.threshold for point in stored.points] == [math.inf, -math.inf]
    gates = Calibration.of({"points": [{"threshold": 0.5, "macs": 1.0}], "easiness": [], "device": "", "images": 2})
    assert gates == Calibration([Point(0.5, 1.0)], images=2)


def found(right: bool, macs: float) -> Detections:
    box = [10.0, 10, 50, 50] if right else [60.0, 60, 90, 90]
    return Detections(torch.tensor([box]), torch.tensor([0.9]), torch.tensor([0]), macs=macs)


def both_ways(difficulty: list[float], first_right: list[bool]) -> BothWays:
    """The second detector always finds the object, the first one on some images."""
    count = len(difficulty)
    target = Target(
        torch.tensor([[10.0, 10, 50, 50]]), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool)
    )
    targets = [
        Target(target.boxes, target.labels, target.crowd, image_id=i, original_size=(100, 100)) for i in range(count)
    ]
    return BothWays(
        torch.tensor(difficulty), [found(right, 1.0) for right in first_right], [found(True, 3.0)] * count, targets,
        torch.full((count, 2), 100), torch.tensor([0.0 if right else 1.0 for right in first_right]),
    )  # fmt: skip


def test_a_perfect_router_needs_only_the_images_that_the_first_detector_misses() -> None:
    ways = both_ways([0.1, 0.9, 0.2, 0.8], [True, False, True, False])
    splits = ways.curve([Category(1, "a")], [0, 0.5, 1])
    assert [split.fraction for split in splits] == [0, 0.5, 1]
    assert [split.macs for split in splits] == [1, 2, 3]
    assert splits[0].ap < 0.6 and splits[1].ap == splits[2].ap == pytest.approx(1)
    assert ways.rank_correlation() == pytest.approx(math.sqrt(0.8))  # ranks 1 3 2 4 less ties in pairs


def test_masks_are_not_kept() -> None:
    detector = build_detector("shapes_mask_rcnn", ["detector=dynamic_two_stage", "+router=exact", "init=x"]).eval()
    assert isinstance(detector, DynamicDetector)
    target = Target(
        torch.tensor([[10.0, 10, 50, 50]]), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool),
        masks=torch.ones(1, 64, 64, dtype=torch.bool), original_size=(64, 64),
        segmentations=[[[10.0, 10, 50, 10, 50, 50]]],
    )  # fmt: skip
    ways = go_both_ways(detector, StaticCosts(detector), Batch(ImageBatch.of(torch.rand(1, 3, 64, 64)), [target]))
    assert len(ways.first[0].boxes) and len(ways.second[0].boxes)
    assert all(item.masks is None for item in (*ways.first, *ways.second, *ways.targets))
    assert ways.targets[0].segmentations is None


def test_a_bad_router_spends_without_gain() -> None:
    splits = both_ways([0.9, 0.1, 0.8, 0.2], [True, False, True, False]).curve([Category(1, "a")], [0.5])
    assert splits[0].ap < 0.6 and splits[0].macs == 2
