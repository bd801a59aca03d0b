"""Anchors, box coding, validity and box arithmetic against single numbers."""

from __future__ import annotations

import math

import pytest
import torch
from anchor_oracles import SHAPES, STRIDES, area, centerness, decode, encode, grid_anchors, iou
from hypothesis import given, settings
from hypothesis import strategies as st

from dyndet.models.predictors.anchors import AnchorGrid, BoxCoder
from dyndet.models.predictors.maps import flat, flat_levels, widened
from dyndet.ops.boxes import boxes_from_ltrb, centerness_from_ltrb, chunks_of, iou_log_loss, paired_iou
from dyndet.ops.grid import valid_masks

CPU = torch.device("cpu")
STD = (0.1, 0.1, 0.2, 0.2)

corner_size = st.tuples(st.floats(-20, 60), st.floats(-20, 60), st.floats(1, 90), st.floats(1, 90))


def box_of(row: tuple[float, ...]) -> list[float]:
    x, y, w, h = (float(torch.tensor(value)) for value in row)
    return torch.tensor([x, y, x + w, y + h]).tolist()


@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize("order", ["scale", "ratio"])
def test_anchors_of_a_pyramid(offset: float, order: str) -> None:
    """Rows, then columns, then shapes; "scale" runs scales fastest (mmdetection), "ratio" ratios (detectron2)."""
    scales, ratios = [2.0, 3.0], [0.5, 1.0, 2.0]
    pairs = [(s, r) for r in ratios for s in scales] if order == "scale" else [(s, r) for s in scales for r in ratios]
    expected = grid_anchors([(s * math.sqrt(1 / r), s * math.sqrt(r)) for s, r in pairs], offset)
    grid = AnchorGrid(scales, ratios, offset, order)  # type: ignore[arg-type]
    assert grid.per_position == 6
    for shape, stride, level in zip(SHAPES, STRIDES, expected, strict=True):
        assert torch.allclose(grid(shape, stride, CPU), torch.tensor(level), atol=1e-5)


def test_the_defaults_are_the_corner_and_scales_first() -> None:
    grid = AnchorGrid([1.0, 4.0], [0.25, 4.0])
    assert grid((1, 1), 8, CPU).tolist() == [[-8, -2, 8, 2], [-32, -8, 32, 8], [-2, -8, 2, 8], [-8, -32, 8, 32]]


def test_the_nine_anchors_of_retinanet() -> None:
    """Sides 32 * 2^(i/3) on stride 8; a ratio is height / width and keeps the area."""
    nine = AnchorGrid.octaves()(SHAPES[0], 8, CPU)[:9]
    width, height = nine[:, 2] - nine[:, 0], nine[:, 3] - nine[:, 1]
    assert (width * height).sqrt().tolist() == pytest.approx([32, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3)] * 3, rel=1e-5)
    assert (height / width).tolist() == pytest.approx([0.5] * 3 + [1.0] * 3 + [2.0] * 3, rel=1e-5)
    last = AnchorGrid.octaves(order="ratio", offset=0.5)((1, 1), 128, CPU)
    assert ((last[:, 2] - last[:, 0]) * (last[:, 3] - last[:, 1])).sqrt()[::3].tolist() == pytest.approx(
        [512, 512 * 2 ** (1 / 3), 512 * 2 ** (2 / 3)], rel=1e-5
    )
    assert torch.allclose((last[:, :2] + last[:, 2:]) / 2, torch.full((9, 2), 64.0), atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(corner_size, corner_size, st.sampled_from([STD, (1.0, 1.0, 1.0, 1.0)]))
def test_deltas_are_shift_over_anchor_and_log_of_sizes(one: tuple, other: tuple, std: tuple) -> None:
    anchor, box = box_of(one), box_of(other)
    coder = BoxCoder(std)
    deltas = coder.encode(torch.tensor([anchor]), torch.tensor([box]))
    assert deltas[0].tolist() == pytest.approx(encode(anchor, box, std), rel=1e-3, abs=2e-3)
    if deltas[0, 2:].abs().max() * std[2] < math.log(60):  # beyond that decoding clamps
        assert coder.decode(torch.tensor([anchor]), deltas)[0].tolist() == pytest.approx(box, abs=2e-3)


@settings(max_examples=60, deadline=None)
@given(corner_size, st.lists(st.floats(-30, 30), min_size=4, max_size=4), st.sampled_from(["both", "upper"]))
def test_log_ratios_are_clamped(row: tuple, deltas: list[float], clamp: str) -> None:
    anchor = box_of(row)
    coder = BoxCoder((1.0, 1.0, 0.5, 0.5), clamp)  # type: ignore[arg-type]
    found = coder.decode(torch.tensor([anchor]), torch.tensor([deltas]))[0]
    expected = decode(anchor, deltas, (1.0, 1.0, 0.5, 0.5), lower=clamp == "both")
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-2)


def test_where_the_clamp_ends() -> None:
    anchor, tiny = torch.tensor([[0.0, 0, 16, 16]]), torch.tensor([[0.0, 0, -50, -50]])
    assert BoxCoder().decode(anchor, -tiny)[0].tolist() == pytest.approx([-492, -492, 508, 508], rel=1e-5)
    assert BoxCoder(clamp="upper").decode(anchor, -tiny)[0].tolist() == pytest.approx([-492, -492, 508, 508], rel=1e-5)
    both, upper = BoxCoder().decode(anchor, tiny)[0], BoxCoder(clamp="upper").decode(anchor, tiny)[0]
    assert (both[2] - both[0]).item() == pytest.approx(0.256, rel=1e-4)  # 16 * 16 / 1000
    assert (upper[2] - upper[0]).item() == 0


def test_boxes_without_area_have_finite_deltas() -> None:
    deltas = BoxCoder(STD).encode(torch.tensor([[0.0, 0, 8, 8]]), torch.tensor([[3.0, 3, 3, 3]]))
    assert deltas.isfinite().all()


def test_unknown_conventions_are_named() -> None:
    with pytest.raises(ValueError, match="order must be 'scale' or 'ratio', got 'size'"):
        AnchorGrid([1.0], order="size")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clamp must be 'both' or 'upper', got 'lower'"):
        BoxCoder(clamp="lower")  # type: ignore[arg-type]


def test_rows_of_a_map_are_positions_then_anchors() -> None:
    maps = torch.arange(2 * 6 * 2 * 3).reshape(2, 6, 2, 3).to(torch.bfloat16)  # A = 3, D = 2
    rows = flat(maps, 2)
    assert rows.shape == (2, 18, 2) and rows.dtype == torch.float32
    for b in range(2):
        for i in range(2):
            for j in range(3):
                for a in range(3):
                    assert rows[b, (i * 3 + j) * 3 + a].tolist() == [maps[b, a * 2 + d, i, j] for d in range(2)]
    both = flat_levels([{"box": maps}, {"box": maps[:, :, :1]}], "box", 2)
    assert torch.equal(both, torch.cat([rows, rows[:, :9]], 1))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 150), st.integers(1, 150)), min_size=1, max_size=3),
    st.sampled_from([8, 16, 32, 64, 128]),
    st.sampled_from([[8, 16, 32, 64, 128], [4, 8, 16], [8]]),
    st.sampled_from([1, 32, 128]),
)
def test_anchors_of_the_own_padded_size_are_valid(
    sizes: list, divisor: int, strides: list[int], padded_to: int
) -> None:
    """A cell counts if it starts inside the image's own size rounded up to the divisor, whatever the batch's size."""
    height, width = (-(-max(side) // padded_to) * padded_to for side in zip(*sizes, strict=True))
    shapes = [(-(-height // s), -(-width // s)) for s in strides]
    exact = valid_masks(torch.tensor(sizes), shapes, strides)
    if exact is None:
        return
    found = widened(exact, strides, divisor)
    for mask, (rows, columns), stride in zip(found, shapes, strides, strict=True):
        assert mask.shape == (len(sizes), 1, rows, columns) and mask.dtype == torch.bool
        for image, (h, w) in enumerate(sizes):
            own = -(-h // divisor) * divisor, -(-w // divisor) * divisor
            expected = [[i * stride < own[0] and j * stride < own[1] for j in range(columns)] for i in range(rows)]
            assert mask[image, 0].tolist() == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(corner_size, corner_size), min_size=1, max_size=4))
def test_iou_of_pairs(pairs: list) -> None:
    first, second = [box_of(a) for a, _ in pairs], [box_of(b) for _, b in pairs]
    expected = [iou(a, b) for a, b in zip(first, second, strict=True)]
    assert paired_iou(torch.tensor(first), torch.tensor(second)).tolist() == pytest.approx(expected, abs=1e-4)
    losses = iou_log_loss(torch.tensor(first), torch.tensor(second)).tolist()
    for loss, overlap in zip(losses, expected, strict=True):
        if overlap == 0:
            assert loss == pytest.approx(-math.log(1e-6), rel=1e-4)
        elif overlap > 0.01:
            assert loss == pytest.approx(-math.log(overlap), abs=2e-3)


def test_boxes_without_area_overlap_nothing() -> None:
    point, square = torch.tensor([[3.0, 3, 3, 3]]), torch.tensor([[0.0, 0, 8, 8]])
    assert paired_iou(point, point).item() == 0 and paired_iou(point, square).item() == 0


def test_iou_of_pairs_broadcasts() -> None:
    many = torch.tensor([[[0.0, 0, 8, 8], [4, 0, 12, 8]], [[0, 0, 4, 8], [8, 8, 9, 9]]])
    one = torch.tensor([[[0.0, 0, 8, 8]], [[0.0, 0, 8, 8]]])
    assert paired_iou(many, one).tolist() == [[1, pytest.approx(1 / 3)], [0.5, 0]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.1, 99), min_size=4, max_size=4))
def test_centerness(ltrb: list[float]) -> None:
    value = centerness_from_ltrb(torch.tensor([ltrb]))
    assert value.item() == pytest.approx(centerness(ltrb), rel=1e-4)
    left, top, right, bottom = ltrb
    box = boxes_from_ltrb(torch.tensor([10.0, 20.0]), torch.tensor(ltrb))
    assert box.tolist() == pytest.approx([10 - left, 20 - top, 10 + right, 20 + bottom], abs=1e-4)
    assert area(box.tolist()) == pytest.approx((left + right) * (top + bottom), rel=2e-3)


@pytest.mark.parametrize(("partners", "limit", "rows"), [(10, 30, 3), (10, 39, 3), (10, 5, 1), (0, 30, 11), (1, 4, 4)])
def test_chunks_stay_below_the_limit(partners: int, limit: int, rows: int) -> None:
    boxes = torch.arange(44.0).reshape(11, 4)
    chunks = list(chunks_of(boxes, partners, limit))
    assert torch.equal(torch.cat(chunks), boxes)
    assert max(len(chunk) for chunk in chunks) == rows
    assert list(chunks_of(boxes[:0], partners, limit)) == []
