"""Level ranges follow the boxes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyndet.data.box_sizes import (
    NEARLY,
    SCALES,
    SHARES,
    anchor_scale,
    base_range,
    box_shapes,
    clustered_anchors,
    reaches,
    shape_iou,
)
from dyndet.data.shapes import ShapesDataset
from dyndet.data.transforms import Resize
from dyndet.errors import DataError

STRIDES = (8, 16, 32)


def test_reaches_are_half_the_longer_sides_at_the_input_size() -> None:
    dataset = ShapesDataset(length=10, size=64)
    boxes = [box for index in (0, 2, 5, 7) for box in dataset[index].target.boxes.tolist()]
    expected = [max(x2 - x1, y2 - y1) for x1, y1, x2, y2 in boxes]  # at twice the size, half of it
    assert reaches(box_shapes(dataset, Resize(128), images=4)).tolist() == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1, 300), min_size=1, max_size=40))
def test_no_other_range_shares_objects_more_evenly(sizes: list[float]) -> None:
    def entropy(base: float) -> float:
        level = [sum(size > base * 2**border for border in range(2)) for size in np.float32(sizes)]
        shares = [level.count(k) / len(level) for k in range(3)]
        return -sum(share * math.log(share) for share in shares if share)

    chosen = base_range(torch.tensor(sizes), STRIDES)
    assert chosen in [share * 8 for share in SHARES]
    assert entropy(chosen) == pytest.approx(max(entropy(share * 8) for share in SHARES), abs=1e-6)


@pytest.mark.parametrize(("sizes", "strides", "expected"), [
    ([], STRIDES, 64.0),  # as published
    ([10.0, 30.0, 50.0], STRIDES, 24.0),  # one object for each level
    ([50.0], (16,), 128.0),
])  # fmt: skip
def test_ranges_that_are_plain_to_see(sizes: list[float], strides: tuple[int, ...], expected: float) -> None:
    assert base_range(torch.tensor(sizes), strides) == expected


@pytest.mark.parametrize(("side", "per_octave", "ratios", "expected"), [
    (40.0, 1, [1.0], 5.0), (24.0, 1, [1.0], 3.0), (48.0, 1, [0.5, 1, 2], 6.0), (40 * 2 ** (1 / 3), 3, [1.0], 5.0),
])  # fmt: skip
def test_anchors_that_fit_exactly_are_chosen(
    side: float, per_octave: int, ratios: list[float], expected: float
) -> None:
    shapes = torch.tensor([[side, side]] * 3)
    assert anchor_scale(shapes, (8,), per_octave=per_octave, ratios=ratios) == expected


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(4, 300), st.floats(4, 300)), min_size=1, max_size=20))
def test_no_larger_scale_fits_nearly_as_well(sides: list[tuple[float, float]]) -> None:
    def iou(box: tuple[float, float], anchor: tuple[float, float]) -> float:
        common = min(box[0], anchor[0]) * min(box[1], anchor[1])
        return common / (box[0] * box[1] + anchor[0] * anchor[1] - common)

    def fit(scale: float) -> float:
        anchors = [(scale * stride / r**0.5, scale * stride * r**0.5) for stride in STRIDES for r in (0.5, 1, 2)]
        return sum(max(iou(box, anchor) for anchor in anchors) for box in sides) / len(sides)

    chosen = anchor_scale(torch.tensor(sides), STRIDES, per_octave=1, ratios=[0.5, 1, 2])
    enough = max(map(fit, SCALES)) - NEARLY
    assert fit(chosen) >= enough - 1e-5
    assert all(fit(scale) < enough + 1e-5 for scale in SCALES if scale > chosen)


def test_scales_without_objects_are_the_published_ones() -> None:
    assert anchor_scale(torch.zeros(0, 2), STRIDES, per_octave=3, ratios=[0.5, 1, 2]) == 4
    assert anchor_scale(torch.zeros(0, 2), STRIDES, per_octave=1, ratios=[1.0]) == 8


def test_clustered_anchors_find_the_shapes_that_there_are() -> None:
    rng = np.random.default_rng(0)
    true = np.array([[10, 14], [22, 18], [40, 44], [60, 30], [90, 120], [200, 160]], np.float64)
    shapes = torch.tensor(np.concatenate([side * rng.uniform(0.97, 1.03, (30, 2)) for side in true])).float()
    anchors = torch.tensor(clustered_anchors(shapes, levels=3, each=2))
    assert anchors.shape == (3, 2, 2)
    assert anchors.flatten(0, 1).prod(1).diff().gt(0).all()  # from small to large
    assert shape_iou(torch.tensor(true).float(), anchors.flatten(0, 1)).amax(1).min() > 0.95
    with pytest.raises(DataError, match=r"2 boxes of different shape for 6 anchors: give predictor\.anchors"):
        clustered_anchors(torch.tensor([[3.0, 4], [5, 6], [3, 4]]), levels=3, each=2)
