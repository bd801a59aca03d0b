"""Which places answer for which objects: candidates, costs, numbers and conflicts."""

from __future__ import annotations

import pytest
import torch
import yolo_oracles as oracle
from anchor_oracles import AmbiguousError, target_of
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from yolo_oracles import ANCHORS, CANVAS, STRIDES, YoloScene, random_preds, yolo_scenes

from dyndet.models.predictors.yolo_assign import Matches, Objects, candidates, choose
from dyndet.models.predictors.yolo_predictor import YoloPredictor
from dyndet.structures import Target

CPU = torch.device("cpu")


def predictor(classes: int = 2, assignment: str = "ota", topk: int = 10) -> YoloPredictor:
    return YoloPredictor(
        4,
        STRIDES,
        num_classes=classes,
        anchors=ANCHORS,
        assignment=assignment,
        topk=topk,  # type: ignore[arg-type]
    )


def listed(matches: list[Matches]) -> list[list[int]]:
    """image, level, anchor, row, column, object of the batch."""
    return [
        [b, level, a, i, j, g]
        for level, found in enumerate(matches)
        for b, a, i, j, g in zip(*(index.tolist() for index in found.place), found.owner.tolist(), strict=True)
    ]


def around(x: float, y: float, columns: int = 6, rows: int = 4, side: float = 8.0) -> set[tuple[int, int]]:
    """Cells (column, row) of a box whose centre lies at x, y of a map, given in cells."""
    centre = torch.tensor([x, y]) * 8
    box = torch.cat([centre - side / 2, centre + side / 2])[None]
    objects = Objects.of([target_of(box.tolist())], CPU)
    found = candidates(objects, torch.tensor([[8.0, 8.0]]), 8, torch.tensor([[columns, rows]]), 4.0)
    cells = [(j, i) for j, i in found.cell.tolist()]
    assert len(cells) == len(set(cells)) or not (0 <= x < columns and 0 <= y < rows)
    return set(cells)


@pytest.mark.parametrize(
    ("x", "y", "cells"),
    [
        (2.25, 1.25, {(2, 1), (1, 1), (2, 0)}),
        (2.75, 1.75, {(2, 1), (3, 1), (2, 2)}),
        (2.25, 1.75, {(2, 1), (1, 1), (2, 2)}),
        (2.5, 1.5, {(2, 1)}),
        (2.0, 1.75, {(2, 1), (1, 1), (2, 2)}),  # on an edge: the cell to the right does not reach back to it
        (0.25, 0.25, {(0, 0)}),
        (1.0, 1.0, {(1, 1)}),  # x > 1, not >=
        (1.125, 0.125, {(1, 0), (0, 0)}),
        (5.75, 3.75, {(5, 3)}),
        (5.25, 2.75, {(5, 2), (4, 2), (5, 3)}),
        (4.75, 3.25, {(4, 3), (5, 3), (4, 2)}),
        (7.5, -1.5, {(5, 0)}),  # outside: clamped
    ],
)
def test_cells(x: float, y: float, cells: set[tuple[int, int]]) -> None:
    assert around(x, y) == cells


def test_anchors_within_four_times() -> None:
    """Ratios of sides below, at and above 4, in both directions and on one side only."""
    box = torch.tensor([[16.0, 16, 32, 24]])  # 16 x 8
    anchors = torch.tensor([[16.0, 8], [63, 8], [64, 8], [4.1, 8], [4, 8], [16, 31], [16, 33], [16, 2.1], [16, 1.9]])
    found = candidates(Objects.of([target_of(box.tolist())], CPU), anchors, 8, torch.tensor([[12, 12]]), 4.0)
    assert sorted(set(found.anchor.tolist())) == [0, 1, 3, 5, 7]


def test_padding_has_no_candidates() -> None:
    """A box at the edge of the image has its neighbour there, but not on the padding beyond."""
    assert around(2.75, 1.25, columns=6) == {(2, 1), (3, 1), (2, 0)}
    assert around(2.75, 1.25, columns=3) == {(2, 1), (2, 0)}
    assert around(2.75, 1.75, columns=3, rows=2) == {(2, 1)}


@settings(max_examples=80, deadline=None)
@given(yolo_scenes())
def test_candidates(scene: YoloScene) -> None:
    starts = torch.tensor([0] + [len(target.boxes) for target in scene.targets]).cumsum(0).tolist()
    try:
        expected = [
            [image, *place[:4], starts[image] + place[4]]
            for image, (size, boxes) in enumerate(zip(scene.sizes, scene.boxes(), strict=True))
            for place in oracle.propose(boxes, size)
        ]
    except AmbiguousError:
        reject()
    masks = scene.valid() or [None] * 3
    objects = Objects.of(scene.targets, CPU)
    found = listed(predictor(scene.classes, "candidates").assign(scene.raw(), objects, masks))
    assert sorted(found) == sorted(expected)
    for image in range(len(scene.sizes)):  # the order within an image decides between duplicates
        assert [row for row in found if row[0] == image] == [row for row in expected if row[0] == image]


@settings(max_examples=80, deadline=None)
@given(yolo_scenes(), st.sampled_from([1, 4, 10]), st.sampled_from([0.3, 1.0, 3.0]))
def test_choice(scene: YoloScene, topk: int, spread: float) -> None:
    raw = scene.raw(spread)
    objects = Objects.of(scene.targets, CPU)
    found = listed(predictor(scene.classes, topk=topk).assign(raw, objects, scene.valid() or [None] * 3))
    proposed, levels, start = 0, oracle.numbers(raw), 0
    for image, (size, boxes, labels) in enumerate(zip(scene.sizes, scene.boxes(), scene.labels(), strict=True)):
        try:
            places = oracle.propose(boxes, size)
            expected = oracle.match(levels, image, boxes, labels, places, topk)
        except AmbiguousError:
            reject()
        assert [row for row in found if row[0] == image] == [[image, *p[:4], start + p[4]] for p in expected]
        assert len(expected) <= min(topk * len(boxes), len(places))
        assert not places or expected
        start += len(boxes)
        proposed += len(places)
    assert len(found) <= proposed


# Of one image, with predictions made up

SURE = torch.tensor([6.0, 6.0, -6.0])  # objectness and two classes
GUESS = torch.zeros(3)


def strips(*overlaps: float) -> torch.Tensor:
    """Boxes inside [0, 0, 10, 10] with these IoUs."""
    return torch.tensor([[0.0, 0.0, 10.0, 10 * overlap] for overlap in overlaps])


WHOLE = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
FIRST = torch.tensor([0])


@pytest.mark.parametrize(
    ("overlaps", "topk", "number"),
    [
        ((1.0, 0.9, 0.0), 10, 1),  # 1.9 is truncated
        ((1.0, 0.9, 0.2), 10, 2),
        ((0.3, 0.2, 0.1), 10, 1),  # at least one
        ((0.9, 0.9, 0.9, 0.9), 3, 2),
        ((0.9, 0.9, 0.9, 0.9), 10, 3),
        ((1.0,), 10, 1),
    ],
)
def test_how_many_an_object_takes(overlaps: tuple[float, ...], topk: int, number: int) -> None:
    chosen = choose(GUESS.expand(len(overlaps), -1), strips(*overlaps), WHOLE, FIRST, topk)
    assert (chosen == 0).sum() == number and (chosen >= 0).tolist() == [n < number for n in range(len(overlaps))]


def test_a_prediction_that_is_proposed_twice_has_one_cost() -> None:
    """Vectorised code may decode the same numbers to boxes that differ in their last digit."""
    boxes, logits = strips(0.3, 0.30001, 0.30002), GUESS.expand(3, -1)
    assert choose(logits, boxes, WHOLE, FIRST, 10).tolist() == [-1, -1, 0]
    assert choose(logits, boxes, WHOLE, FIRST, 10, torch.tensor([0, 0, 2])).tolist() == [-1, -1, 0]
    assert choose(logits, boxes, WHOLE, FIRST, 10, torch.tensor([0, 0, 0])).tolist() == [0, -1, -1]


def test_class_objectness_and_overlap_make_the_cost() -> None:
    boxes = strips(0.5, 0.5, 0.5)
    wrong, unsure = SURE[[0, 2, 1]], torch.tensor([-2.0, 6.0, -6.0])
    assert choose(torch.stack([wrong, SURE, GUESS]), boxes, WHOLE, FIRST, 10).tolist() == [-1, 0, -1]
    assert choose(torch.stack([unsure, SURE]), boxes[:2], WHOLE, FIRST, 10).tolist() == [-1, 0]
    # 3 log(0.5 / 0.2) = 2.7 outweighs sqrt(sigmoid(-2)) for sure: 1.1
    assert choose(torch.stack([unsure, SURE]), strips(0.5, 0.2), WHOLE, FIRST, 10).tolist() == [0, -1]
    # but not 3 log(0.5 / 0.4) = 0.7
    assert choose(torch.stack([unsure, SURE]), strips(0.5, 0.4), WHOLE, FIRST, 10).tolist() == [-1, 0]
    # No overlap costs 3 log(1e8) = 55; hardly any, 3 log(100) = 14, is better even with the wrong class, 9.
    assert choose(torch.stack([SURE, wrong]), strips(0.0, 0.01), WHOLE, FIRST, 10).tolist() == [-1, 0]


def test_a_conflict_goes_to_the_cheapest_of_those_who_take() -> None:
    """Both objects want the only candidate; one overlaps it more, or it says the class of the other."""
    wanted = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 9]])
    chosen = choose(GUESS[None], strips(0.94), wanted, torch.tensor([0, 0]), 10)
    assert chosen.tolist() == [1]  # 0.9 / 0.94 > 0.94
    chosen = choose(SURE[None], strips(0.94), wanted, torch.tensor([0, 1]), 10)
    assert chosen.tolist() == [0]
    # The third would be the cheapest for the second candidate, but takes another.
    wanted = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 8], [0.0, 0, 10, 9]])
    boxes = torch.tensor([[0.0, 0, 10, 9], [0.0, 0, 10, 8.9]])
    assert choose(GUESS.expand(2, -1), boxes, wanted, torch.zeros(3).long(), 1).tolist() == [2, 1]


def test_an_object_takes_what_others_proposed() -> None:
    """It proposes nothing itself (its shape fits no anchor), and takes the neighbour's candidate all the same."""
    thin = [8.0, 8.0, 90.0, 10.0]
    square = [12.0, 3.0, 28.0, 19.0]
    assert not [p for p in oracle.propose([thin], CANVAS) if p[4] == 0]
    objects = Objects.of([target_of([square, thin], [0, 1])], CPU)
    owners = {row[5] for row in listed(predictor().assign(random_preds(1, 2), objects, [None] * 3))}
    assert owners == {0, 1}


def test_certain_predictions_have_finite_costs() -> None:
    logits = torch.tensor([[90.0, 90.0, -90.0], [-90.0, 0.0, 0.0], [90.0, -90.0, 90.0], [1.0, 1.0, -1.0]])
    chosen = choose(logits, strips(0.9, 0.9, 0.9, 0.1), WHOLE, FIRST, 2)
    assert chosen.tolist() == [0, -1, -1, -1]
    empty = torch.zeros(4, 4)
    assert choose(logits, empty, WHOLE, FIRST, 10).tolist() == [0, -1, -1, -1]
    assert choose(logits, empty, empty[:1], FIRST, 10).tolist() == [0, -1, -1, -1]


def test_images_do_not_mix() -> None:
    """The same image twice, once in the company of another: its own objects, its own candidates."""
    one = target_of([[3.1, 4.2, 33.3, 38.4], [20.2, 10.6, 52.1, 40.8]], [1, 0])
    other = target_of([[40.0, 20.0, 71.0, 50.0]], [0])
    raw = random_preds(1, 2, seed=3)
    alone = listed(predictor().assign(raw, Objects.of([one], CPU), [None] * 3))
    three = [{"pred": torch.cat([level["pred"], -level["pred"], level["pred"]])} for level in raw]
    found = listed(predictor().assign(three, Objects.of([one, other, one], CPU), [None] * 3))
    assert [row for row in found if row[0] == 0] == alone
    assert [[0, *row[1:5], row[5] - 3] for row in found if row[0] == 2] == alone
    assert {row[5] for row in found if row[0] == 1} == {2}


def test_nothing_to_assign() -> None:
    nothing = target_of([])
    for targets in ([nothing, nothing], [target_of([[0.0, 0, 90, 1]]), nothing]):  # a line fits no anchor
        found = predictor().assign(random_preds(2, 2), Objects.of(targets, CPU), [None] * 3)
        assert listed(found) == []


def test_objects_of_a_batch() -> None:
    targets: list[Target] = [target_of([[0.0, 2, 4, 10]], [1]), target_of([]), target_of([[1.0, 1, 2, 2]] * 2, [0, 2])]
    objects = Objects.of(targets, CPU)
    assert objects.image.tolist() == [0, 2, 2] and objects.labels.tolist() == [1, 0, 2]
    assert objects.centre[0].tolist() == [2, 6] and objects.size[0].tolist() == [4, 8]
