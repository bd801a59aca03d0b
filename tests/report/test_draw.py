"""Geometry of the pictures: where boxes, gates and compute land."""

from __future__ import annotations

import itertools
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from dyndet.report.draw import _tag, contact_sheet, draw_detections, visible
from dyndet.report.gate_maps import compute_map, draw_gates, gate_map, gate_panels, preview, summary
from dyndet.report.style import class_color, contrast, heat, side_by_side, text_color, to_picture
from dyndet.routing import LayerCost, Routes, Routing
from dyndet.structures import Detections, Target
from routing_views import PathGate, routing_of, views

GREY = torch.full((3, 400, 400), 128, dtype=torch.uint8)
NAMES = ["cat", "dog", "bird"]


def detections(*boxes: list[float], score: float = 0.9, label: int = 0) -> Detections:
    count = len(boxes)
    return Detections(
        torch.tensor(boxes).reshape(-1, 4), torch.full((count,), score), torch.full((count,), label).long()
    )


def target(*boxes: list[float], crowd: bool = False, **extra: object) -> Target:
    count = len(boxes)
    labels, crowds = torch.zeros(count).long(), torch.full((count,), crowd)
    return Target(torch.tensor(boxes).reshape(-1, 4), labels, crowds, **extra)  # type: ignore[arg-type]


def test_box_edges_lie_on_the_pixels_of_the_box() -> None:
    picture = np.array(draw_detections(GREY, detections([100, 120, 200, 260]), NAMES))
    inside = (picture == class_color(0)).all(2)[:, 150:]  # right of the label, which sits at the left corner
    assert inside[200, 48:50].all() and not inside[200, 50:].any()  # last columns are 198 and 199
    assert inside[258:260, 30].all() and not inside[260, 30] and not inside[257, 30]
    assert inside[120:122, 45].all() and not inside[122, 45]
    assert inside[200].sum() == 2, "the inside must stay visible"


def test_small_images_are_enlarged_by_a_whole_factor() -> None:
    small = torch.zeros(3, 96, 128, dtype=torch.uint8)
    picture = draw_detections(small, detections([10, 40, 60, 80], label=1), NAMES)
    assert picture.size == (384, 288)
    pixels = np.array(picture)
    assert tuple(pixels[239, 90]) == tuple(pixels[200, 179]) == class_color(1)
    assert draw_detections(GREY, detections(), NAMES).size == (400, 400)


def test_boxes_of_another_size_are_scaled() -> None:
    one = draw_detections(GREY, detections([100, 100, 200, 300]), NAMES)
    two = draw_detections(GREY, detections([50, 25, 100, 75]), NAMES, boxes_size=(100, 200))
    assert np.array_equal(np.array(one), np.array(two))


def test_low_scores_are_left_out() -> None:
    found = detections([100, 100, 200, 200], score=0.29)
    assert np.array_equal(np.array(draw_detections(GREY, found, NAMES)), np.array(to_picture(GREY)))
    assert not np.array_equal(
        np.array(draw_detections(GREY, found, NAMES, score_threshold=0.2)), np.array(to_picture(GREY))
    )


def test_crowds_are_dashed() -> None:
    edges = []
    for crowd in (False, True):
        picture = np.array(draw_detections(GREY, target([100, 100, 300, 300], crowd=crowd), NAMES))
        edges.append((picture[299, 100:300] == class_color(0)).all(1))
    solid, dashed = edges
    assert solid.all()
    assert 0.4 < dashed.mean() < 0.6


def test_masks_tint_their_pixels_only() -> None:
    mask = torch.zeros(1, 400, 400, dtype=torch.bool)
    mask[:, 250:350, 250:350] = True
    item = target([10, 10, 60, 60], masks=mask)
    picture = np.array(draw_detections(GREY, item, NAMES))
    changed = (picture != 128).any(2)
    assert changed[250:350, 250:350].all() and not changed[200:250].any() and not changed[350:].any()
    outline = (picture == class_color(0)).all(2)[245:355, 245:355]
    expected = np.zeros((110, 110), dtype=bool)
    expected[5:105, 5:105] = True
    expected[6:104, 6:104] = False
    assert (outline == expected).all()


def test_masks_may_be_empty_or_reach_the_border() -> None:
    masks = torch.zeros(2, 400, 400, dtype=torch.bool)
    masks[1, :, :3] = True
    found = detections([10, 10, 60, 60], [10, 100, 60, 160])
    found.masks = masks
    picture = np.array(draw_detections(GREY, found, NAMES))
    assert (picture[:, 0] == class_color(0)).all() and (picture[100:, 3] == 128).all()


def test_masks_are_translucent_and_the_best_lies_on_top() -> None:
    masks = torch.zeros(3, 400, 400, dtype=torch.bool)
    masks[0, 200:300, 200:300] = masks[1, 250:350, 250:350] = masks[2, 300:390, 20:90] = True
    found = detections([200, 200, 300, 300], [250, 250, 350, 350], [20, 300, 90, 390])
    found.masks, found.labels, found.scores = masks, torch.tensor([0, 1, 2]), torch.tensor([0.9, 0.5, 0.1])
    image = torch.full((3, 400, 400), 128, dtype=torch.uint8)
    image[:, :, ::2] = 60  # stripes must show through
    picture = np.array(draw_detections(image, found, NAMES)).astype(int)

    def mixed(below: np.ndarray, label: int) -> np.ndarray:
        share = 110 / 255
        return (1 - share) * below + share * np.array(class_color(label))

    for column, ground in ((282, 60), (283, 128)):
        below = np.full(3, ground)
        assert np.abs(picture[225, column] - mixed(below, 0)).max() <= 1
        assert np.abs(picture[330, column] - mixed(below, 1)).max() <= 1
        assert np.abs(picture[275, column] - mixed(mixed(below, 1), 0)).max() <= 2
    assert (picture[340, 30:80:2] == 60).all(), "below the threshold"


def test_boxes_outside_and_of_no_size_and_unnamed_classes_are_drawn() -> None:
    found = detections([-50, -20, 10, 5], [390, 395, 500, 600], [50, 50, 50, 50], label=7)
    assert draw_detections(GREY, found, NAMES).size == (400, 400)


def test_pictures_show_one_box_per_object_and_files_all() -> None:
    boxes = [
        [100.0, 100, 200, 200],
        [104, 100, 204, 200],
        [100, 100, 200, 166],
        [100, 100, 200, 139],
        [300, 300, 350, 350],
    ]
    found = detections(*boxes)
    found.scores, found.labels = torch.tensor([0.5, 0.9, 0.8, 0.6, 0.41]), torch.tensor([0, 1, 1, 2, 0])
    assert visible(found, 0.4).boxes.tolist() == [
        boxes[1],
        boxes[3],
        boxes[4],
    ]
    assert visible(found, 0.55).scores.tolist() == pytest.approx([0.9, 0.6])
    best = found[torch.tensor([1, 3, 4])]
    assert np.array_equal(np.array(draw_detections(GREY, found, NAMES)), np.array(draw_detections(GREY, best, NAMES)))
    assert summary(found, None) == "(3 of 5, one per object)" and summary(best, None) == "(3)"
    assert len(found) == 5


def test_captions_tell_route_and_price() -> None:
    routes = Routes(torch.tensor([False, True]), torch.tensor([-1.0, 0.0]))
    found = replace(detections([10, 10, 20, 20]), macs=1.234e9)
    assert summary(found, routes, 1) == "(1), hard (difficulty 0.50), 1.23 GMAC"
    assert summary(found, Routes(torch.tensor([False])), 0) == "(1), easy, 1.23 GMAC"


def test_letters_can_be_read_on_every_class() -> None:
    colors = [class_color(label) for label in range(100)]
    assert min(contrast(color, text_color(color)) for color in colors) >= 4.5
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.01)  # the usual example


def test_letters_grow_with_the_picture() -> None:
    def label_pixels(side: int) -> int:
        image = torch.full((3, side, side), 128, dtype=torch.uint8)
        box = [side * 0.5, side * 0.5, side * 0.5 + 9, side * 0.5 + 9]
        picture = np.array(draw_detections(image, detections(box), NAMES)).astype(int)
        return int((picture == class_color(0)).all(2).any(1).sum())

    assert label_pixels(2000) > 2 * label_pixels(600) - 9


@given(st.lists(st.tuples(st.integers(0, 360), st.integers(0, 380)), min_size=2, max_size=8, unique=True))
@example([(0, 2), (0, 1), (0, 0)])
def test_labels_hide_no_other_label(corners: list[tuple[int, int]]) -> None:
    """Boxes of 4 pixels are all smaller than a label: what is drawn, but for outlines, are labels, apart."""
    pen, tags = ImageDraw.Draw(Image.new("RGB", (420, 420))), []
    for x, y in corners:
        _tag(pen, (x, y, x + 4, y + 4), "cat 0.50", (200, 60, 40), tags)
    assert all(0 <= left < right <= 420 and 0 <= top < bottom <= 420 for left, top, right, bottom in tags)
    pairs = itertools.combinations(tags, 2)
    assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for a, b in pairs)


def test_a_name_longer_than_the_picture_is_written_smaller() -> None:
    picture = draw_detections(GREY, detections([10, 100, 60, 200]), ["a class whose name fills more than a whole line"])
    marked = (np.array(picture) == class_color(0)).all(2)
    assert marked[:, 300:].any() and picture.size == (400, 400)


def test_classes_have_distinct_colors() -> None:
    colors = np.array([class_color(label) for label in range(80)])
    assert len({tuple(color) for color in colors}) == 80
    neighbours = np.abs(np.diff(colors.astype(int), axis=0)).sum(1)
    assert neighbours.min() > 100


def test_float_images_are_drawn_too() -> None:
    assert np.array_equal(np.array(to_picture(GREY.float() / 255)), np.array(to_picture(GREY)))


def test_contact_sheet() -> None:
    pictures = [Image.new("RGB", (40, 30), (index, 0, 0)) for index in range(1, 6)]
    sheet = contact_sheet(pictures, columns=2, gap=4)
    assert sheet.size == (2 * 40 + 3 * 4, 3 * 30 + 4 * 4)
    assert [sheet.getpixel((4 + 44 * (i % 2), 4 + 34 * (i // 2))) for i in range(5)] == [(i, 0, 0) for i in range(1, 6)]
    assert contact_sheet(pictures[:1]).size == (56, 46)
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])


def routing(valid: bool = True) -> Routing:
    """Levels of stride 8 and 16 on padded 64 x 96; two nodes; the second image has only 48 x 64 valid pixels."""
    generator = torch.Generator().manual_seed(0)
    gates = []
    for level, stride in enumerate((8, 16)):
        height, width = 64 // stride, 96 // stride
        mask = torch.ones(2, 1, height, width, dtype=torch.bool)
        mask[1, :, 48 // stride :] = False
        mask[1, :, :, 64 // stride :] = False
        for node in ("cls.0", "reg.0"):
            gate = torch.rand(2, 1, height, width, generator=generator) - 0.6
            gate = gate.clamp(min=0) * mask
            costs = (LayerCost(576.0, 1), LayerCost(64.0))
            gates.append(PathGate(node, "depth", level, gate, costs, valid=mask if valid else None))
        up = torch.rand(2, 1, height, width, generator=generator) * mask
        gates.append(PathGate("cls.0", "up", level, up, (LayerCost(100.0),), valid=mask if valid else None))
    return routing_of(gates)


@pytest.mark.parametrize("valid", [True, False])
def test_compute_map_adds_up_to_the_cost(valid: bool) -> None:
    item = routing(valid)
    for index in range(2):
        used = compute_map(item, index, strides=(8, 16))
        assert used.shape == (64, 96)
        assert float(used.sum()) == pytest.approx(float(item.used()[index]))
        full = compute_map(item, index, strides=(8, 16), full=True)
        assert float(full.sum()) == pytest.approx(float(item.full()[index]))
        assert (used <= full + 1e-9).all()


def test_compute_lands_where_the_gate_is() -> None:
    gate = torch.zeros(1, 1, 4, 4)
    gate[0, 0, 1, 2] = 0.5
    item = routing_of([PathGate("n", "depth", 0, gate, (LayerCost(640.0),))])
    expected = torch.zeros(32, 32, dtype=torch.float64)
    expected[8:16, 16:24] = 10
    assert torch.equal(compute_map(item, 0, strides=(8,)), expected)


def test_gate_map_is_the_mean_over_nodes() -> None:
    item = routing()
    depth = [gate for gate in views(item) if gate.path == "depth" and gate.level == 1]
    found = gate_map(item, 0, 1, path="depth")
    assert found is not None
    assert torch.equal(found[0], sum((gate.gate[0, 0] > 0).float() for gate in depth) / 2)
    assert found[1] == pytest.approx(float(found[0].mean()))
    one = gate_map(item, 0, 1, node="reg.0", path="depth", soft=True)
    assert one is not None and torch.equal(one[0], depth[1].gate[0, 0])
    assert gate_map(item, 0, 1, path="down") is None


def test_panels_show_the_gates_in_the_colors_of_the_map() -> None:
    gate = torch.zeros(1, 1, 4, 4)
    gate[0, 0, 0, 3] = 0.5
    item = routing_of([PathGate("n", "depth", 0, gate, (LayerCost(10.0),))])
    panels = gate_panels(torch.zeros(3, 400, 400, dtype=torch.uint8), item, 0, strides=(100,), opacity=1.0)
    assert len(panels) == 2  # compute and one level
    low, high = (np.array(matplotlib.colormaps["magma"](value)[:3]) * 255 for value in (0.0, 1.0))
    for panel in panels:
        assert panel.size == (400, 422)
        pixels = np.array(panel)[22:].astype(float)
        assert np.abs(pixels[:100, 300:] - high).max() <= 1
        assert np.abs(pixels[100:] - low).max() <= 1 and np.abs(pixels[:, :300] - low).max() <= 1


def test_strip_has_a_panel_per_level_and_one_for_compute() -> None:
    item = routing()
    image = torch.zeros(3, 48, 64, dtype=torch.uint8)  # cut to the valid size of the second image
    strip = draw_gates(image, item, 1, strides=(8, 16), min_side=64)
    assert strip.size == (3 * 64 + 4 * 6, 48 + 22 + 2 * 6)
    assert draw_gates(image, item, 1, strides=(8, 16), path="down", min_side=64).width == 64 + 2 * 6


def test_preview_scales_detections_from_the_image_on_disk() -> None:
    item = routing()
    image = torch.zeros(3, 64, 96, dtype=torch.uint8)
    truth = target([8, 8, 40, 40], original_size=(480, 640), masks=torch.zeros(1, 64, 96, dtype=torch.bool))
    found = detections([80, 80, 400, 400])
    strip = preview(image, truth, found, item, 1, names=NAMES, strides=(8, 16), size=(48, 64), min_side=64)
    assert strip.size == (5 * 64 + 6 * 6, 48 + 22 + 2 * 6)
    pixels = np.array(strip)
    top, left = 6 + 22, 6
    panels = [pixels[top : top + 48, left + 70 * index : left + 70 * index + 64] for index in range(2)]
    edge = [(panel[39, 8:40] == class_color(0)).all() for panel in panels]
    assert edge == [True, True]
    assert preview(image, None, None, None, names=NAMES).width == 96 + 2 * 6
    assert preview(image, truth, None, None, names=NAMES, size=(48, 64), min_side=64).width == 64 + 2 * 6


def test_preview_scales_masks_from_the_image_on_disk() -> None:
    image = torch.zeros(3, 64, 96, dtype=torch.uint8)  # the image is 48 x 64 of it
    truth = target([8, 8, 40, 40], original_size=(480, 640), masks=torch.zeros(1, 64, 96, dtype=torch.bool))
    found = detections([80, 80, 400, 400])
    assert truth.masks is not None
    truth.masks[0, 24:32, 16:24] = True
    found.masks = torch.zeros(1, 480, 640, dtype=torch.bool)
    found.masks[0, 240:320, 160:240] = True
    pixels = np.array(preview(image, truth, found, None, names=NAMES, size=(48, 64), min_side=64))
    top, left = 6 + 22, 6
    for index in range(2):
        panel = pixels[top : top + 48, left + 70 * index : left + 70 * index + 64]
        tinted = panel[:, 12:36].any(2)[27:36]  # below the label, inside the box
        expected = np.zeros((9, 24), dtype=bool)
        expected[:5, 4:12] = True
        assert (tinted == expected).all()


def test_heat_and_strip() -> None:
    colors = np.array(heat(torch.tensor([[0.0, 1.0, 7.0]])))
    assert tuple(colors[0, 1]) == tuple(colors[0, 2]) != tuple(colors[0, 0])
    strip = side_by_side([Image.new("RGB", (10, 5), (9, 9, 9)), Image.new("RGB", (20, 8), (7, 7, 7))], gap=2)
    assert strip.size == (36, 12)
    assert strip.getpixel((2, 2)) == (9, 9, 9) and strip.getpixel((14, 2)) == (7, 7, 7)
