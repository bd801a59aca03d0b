"""Rows of a pyramid: order, views, neighbours."""

from __future__ import annotations

from itertools import product

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyndet.layout import RowLayout
from dyndet.ops.sparse.tables import neighbours, segment, starts

SHAPES = [(5, 7), (3, 4), (1, 1)]


def maps(batch: int = 2, channels: int = 3) -> list[torch.Tensor]:
    return [torch.randn(batch, channels, *shape) for shape in SHAPES]


def test_maps_are_views_of_rows_and_come_back() -> None:
    features = maps()
    layout = RowLayout.of(features)
    rows = layout.rows(features)
    assert rows.shape == (2 * (35 + 12 + 1) + 1, 3)
    assert not rows[-1].any()
    for x, view in zip(features, layout.maps(rows), strict=True):
        assert torch.equal(x, view)
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert view.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()


def test_flat_and_unflat() -> None:
    features = maps(channels=1)
    layout = RowLayout.of(features)
    for x, back in zip(features, layout.unflat(layout.flat(features)), strict=True):
        assert torch.equal(x, back)


def test_operators_can_rebuild_a_layout() -> None:
    layout = RowLayout.of(maps())
    assert RowLayout.from_sizes(layout.sizes, layout.device) == layout


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3), st.integers(1, 3))
def test_neighbours_against_a_loop(shapes: list[tuple[int, int]], batch: int) -> None:
    layout = RowLayout(tuple(shapes), batch, torch.device("cpu"))
    expected: list[list[int]] = []
    start = 0
    for height, width in shapes:
        for _ in range(batch):
            for y, x in product(range(height), range(width)):
                near = [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
                inside = [0 <= y < height and 0 <= x < width for y, x in near]
                expected.append(
                    [start + y * width + x if ok else layout.positions for (y, x), ok in zip(near, inside, strict=True)]
                )
            start += height * width
    assert neighbours(layout).tolist() == expected
    assert segment(layout).tolist() == [
        level * batch + image
        for level, (height, width) in enumerate(shapes)
        for image in range(batch)
        for _ in range(height * width)
    ]
    assert int(starts(layout)[-1]) == layout.positions
    assert starts(layout).diff().tolist() == segment(layout).bincount().tolist()
