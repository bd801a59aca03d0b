"""Level ranges follow the boxes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyndet.data.box_sizes import SHARES, base_range, reaches
from dyndet.data.shapes import ShapesDataset
from dyndet.data.transforms import Resize

STRIDES = (8, 16, 32)


def test_reaches_are_half_the_longer_sides_at_the_input_size() -> None:
    dataset = ShapesDataset(length=10, size=64)
    boxes = [box for index in (0, 2, 5, 7) for box in dataset[index].target.boxes.tolist()]
    expected = [max(x2 - x1, y2 - y1) for x1, y1, x2, y2 in boxes]  # at twice the size, half of it
    assert reaches(dataset, Resize(128), images=4).tolist() == pytest.approx(expected)


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
