"""Boxes against the levels of a detector, counted point by point."""

from __future__ import annotations

import pytest
import torch

import dyndet
from dyndet.checkup.levels import check_levels, check_sizes, seen_boxes, share_levels
from dyndet.checkup.split import Split
from dyndet.data.shapes import ShapesDataset
from dyndet.data.transforms import Resize
from dyndet.models.predictors.fcos import FCOS
from dyndet.models.predictors.fcos_assign import regress_ranges


@pytest.fixture(scope="module")
def split() -> Split:
    return Split.of("train", ShapesDataset(length=12, size=64, seed=3))


def test_boxes_are_those_that_the_transform_makes(split: Split) -> None:
    transform = Resize((96, 128))
    for (size, boxes), index in zip(seen_boxes(split, transform), range(len(split)), strict=True):
        expected = transform(split.dataset[index], torch.Generator())
        assert size == (96, 128)
        torch.testing.assert_close(boxes, expected.target.boxes)


@pytest.mark.parametrize("base", [2, 6, 24])
def test_shares_are_those_of_all_points(split: Split, base: int) -> None:
    """A box is reached at a level if a point in its centre regresses a distance of that level and no smaller box is."""
    overrides = ["data.size=64", f"predictor.assigner.base_range={base}"]
    detector = dyndet.build_detector("shapes_dyn", overrides)
    predictor = detector.predictor
    assert isinstance(predictor, FCOS)
    seen = seen_boxes(split, Resize(64))
    shares = share_levels(seen, detector)
    assert shares is not None
    counts, lost = [0] * len(detector.strides), 0
    for _, boxes in seen:
        owners: list[set[int]] = [set() for _ in boxes]
        for level, (stride, (low, high)) in enumerate(
            zip(detector.strides, regress_ranges(len(detector.strides), base), strict=True)
        ):
            for row in range(64 // stride):
                for column in range(64 // stride):
                    x, y = ((place + predictor.point_offset) * stride for place in (column, row))
                    fitting = []
                    for number, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
                        sides = (x - x1, y - y1, x2 - x, y2 - y)
                        near = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2)) < 1.5 * stride
                        if min(sides) > 0 and near and low <= max(sides) <= high:
                            fitting.append(((x2 - x1) * (y2 - y1), number))
                    if fitting:
                        owners[min(fitting)[1]].add(level)
        lost += sum(not levels for levels in owners)
        for levels in owners:
            for level in levels:
                counts[level] += 1
    assert (shares.lost, list(shares.boxes)) == (lost, counts)
    findings = {finding.check: finding.count for finding in check_levels(split, shares)}
    assert findings == {k: v for k, v in {"boxes without a point": lost, "idle levels": counts.count(0)}.items() if v}


def test_thin_boxes(split: Split) -> None:
    seen = seen_boxes(split, Resize(16))
    thin = sum(int(((boxes[:, 2:] - boxes[:, :2]).amin(1) < 8).sum()) for _, boxes in seen)
    (finding,) = check_sizes(split, seen, [8, 16])
    assert finding.count == thin > 0
    assert check_sizes(split, seen_boxes(split, Resize(512)), [8, 16]) == []
