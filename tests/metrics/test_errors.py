"""Confusions by double loops; every kind of error once, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from dyndet.metrics.confusion import confusion_matrix
from dyndet.metrics.curves import class_curve
from dyndet.metrics.error_split import KINDS, ap_gains, find_mistakes
from dyndet.metrics.matching import match
from dyndet.structures import Detections, Target

Box = tuple[float, float, float, float]


def truth(*objects: tuple[Box, int], crowd: tuple[int, ...] = (), image_id: int = 0) -> Target:
    boxes, labels = [list(box) for box, _ in objects], [label for _, label in objects]
    many = torch.tensor([index in crowd for index in range(len(objects))], dtype=torch.bool)
    return Target(
        torch.tensor(boxes, dtype=torch.float32).view(-1, 4), torch.tensor(labels, dtype=torch.int64), many,
        image_id=image_id, original_size=(100, 100),
    )  # fmt: skip


def found(*detections: tuple[Box, int, float]) -> Detections:
    boxes, labels, scores = [[item[index] for item in detections] for index in range(3)]
    return Detections(
        torch.tensor(boxes, dtype=torch.float32).view(-1, 4), torch.tensor(scores), torch.tensor(labels).long()
    )


A, B, C = (0.0, 0.0, 20.0, 20.0), (50.0, 0.0, 70.0, 20.0), (0.0, 50.0, 20.0, 70.0)
HALF_A, NOWHERE = (10.0, 0.0, 30.0, 20.0), (80.0, 80.0, 95.0, 95.0)  # IoU of HALF_A and A is 1/3


@pytest.mark.parametrize(
    ("target", "detections", "kinds"),
    [
        (truth((A, 0)), found((A, 1, 0.9)), ["classification"]),
        (truth((A, 0)), found((HALF_A, 0, 0.9)), ["localisation"]),
        (truth((A, 0)), found((HALF_A, 1, 0.9)), ["both", "missed"]),
        (truth((A, 0)), found((A, 0, 0.9), (A, 0, 0.8)), ["duplicate"]),
        (truth((A, 0)), found((A, 0, 0.9), (NOWHERE, 0, 0.8)), ["background"]),
        (truth(), found((A, 0, 0.9)), ["background"]),
        (truth((A, 0), (B, 1)), found((A, 0, 0.9)), ["missed"]),
        (truth((A, 0), (A, 1)), found((A, 0, 0.9), (A, 1, 0.8)), []),
        (truth((A, 0), crowd=(0,)), found((A, 0, 0.9), (A, 0, 0.8)), []),
        (truth((A, 0), crowd=(0,)), found((A, 1, 0.9)), ["background"]),
    ],
)
def test_kinds(target: Target, detections: Detections, kinds: list[str]) -> None:
    mistakes = find_mistakes(match([detections], [target], 2), [detections], [target])
    assert [item.kind for item in mistakes] == kinds


def test_mistakes_name_what_they_are_about() -> None:
    targets = [truth((A, 0)), truth((B, 1), (C, 0), image_id=3)]
    detections = [found((A, 0, 0.5)), found((NOWHERE, 1, 0.8), (B, 0, 0.7))]
    wrong, confused, missed = find_mistakes(match(detections, targets, 2), detections, targets)
    assert (wrong.kind, wrong.image, wrong.detection, wrong.object, wrong.label) == ("background", 1, 0, -1, 1)
    assert (confused.kind, confused.detection, confused.object, confused.label) == ("classification", 1, 0, 0)
    assert confused.score == pytest.approx(0.7)
    assert (missed.kind, missed.image, missed.object, missed.detection, missed.label) == ("missed", 1, 1, -1, 0)


def gains(detections: list[Detections], targets: list[Target]) -> dict[str, float]:
    matches = match(detections, targets, 2)
    return {
        kind: round(gain, 6)
        for kind, gain in ap_gains(matches, find_mistakes(matches, detections, targets), targets).items()
        if gain > 1e-9
    }


def test_gains_by_hand() -> None:
    one = truth((A, 0))
    assert gains([found((HALF_A, 0, 0.9))], [one]) == {"localisation": 1}
    # A class without detections has AP 0; put right, its only object is found.
    assert gains([found((A, 0, 0.9), (B, 0, 0.8))], [truth((A, 0), (B, 1))]) == {"classification": 0.5}
    assert gains([found((NOWHERE, 0, 0.9), (A, 0, 0.8))], [one]) == {"background": 0.5}  # precision 1/2 to 1
    assert gains([found((HALF_A, 1, 0.9), (A, 0, 0.8)), found((A, 1, 0.7))], [one, truth((A, 1), image_id=1)]) == {
        "both": 0.25  # of class 1, as before; class 0 is perfect
    }
    # Recall ends at 1/2: 51 of the 101 recalls are reached.
    (kind, gain), *others = gains([found((A, 0, 0.9))], [truth((A, 0), (B, 0))]).items()
    assert kind == "missed" and gain == pytest.approx(50 / 101, abs=1e-6) and not others
    # Two right ones with a duplicate between: precision 2/3 beyond recall 1/2.
    (kind, gain), *others = gains([found((A, 0, 0.9), (A, 0, 0.8), (B, 0, 0.7))], [truth((A, 0), (B, 0))]).items()
    assert kind == "duplicate" and gain == pytest.approx(50 / 101 / 3, abs=1e-6) and not others


def test_only_the_best_of_several_fixes_an_object() -> None:
    """The second poor box of an object goes; both put right would be a hit too many."""
    detections, targets = [found((HALF_A, 0, 0.9), (HALF_A, 0, 0.8))], [truth((A, 0))]
    assert gains(detections, targets) == {"localisation": 1}
    matches = match(detections, targets, 2)
    assert class_curve(matches, 0).average_precision() == 0 and list(KINDS) == list(ap_gains(matches, [], targets))


boxes = st.tuples(*[st.integers(0, 5).map(lambda x: 4.0 * x)] * 2, *[st.integers(2, 5).map(lambda x: 4.0 * x)] * 2).map(
    lambda box: (box[0], box[1], box[0] + box[2], box[1] + box[3])
)
objects = st.lists(st.tuples(boxes, st.integers(0, 1)), max_size=4)
guesses = st.lists(st.tuples(boxes, st.integers(0, 1), st.sampled_from([0.2, 0.4, 0.6, 0.8])), max_size=5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(objects, guesses), min_size=1, max_size=3))
def test_confusion_by_double_loops(scenes: list[tuple[list[tuple[Box, int]], list[tuple[Box, int, float]]]]) -> None:
    targets = [truth(*things, image_id=index) for index, (things, _) in enumerate(scenes)]
    detections = [found(*sorted(items, key=lambda item: -item[2])) for _, items in scenes]
    thresholds = [0.4, 0.5]
    expected = np.zeros((3, 3), int)
    for target, items in zip(targets, detections, strict=True):
        pairs = []
        for i in range(len(items)):
            for j in range(len(target.labels)):
                shared = float(box_iou(items.boxes[i][None].double(), target.boxes[j][None].double()))
                if shared >= 0.5 and items.scores[i] >= torch.tensor(thresholds)[items.labels[i]]:
                    pairs.append((items.labels[i] != target.labels[j], -shared, i, j))
        seen: set[int] = set()
        taken: set[int] = set()
        for _, _, i, j in sorted(pairs):
            if i not in seen and j not in taken:
                seen.add(i)
                taken.add(j)
                expected[target.labels[j], items.labels[i]] += 1
        for i in range(len(items)):
            if i not in seen and items.scores[i] >= torch.tensor(thresholds)[items.labels[i]]:
                expected[2, items.labels[i]] += 1
        for j in range(len(target.labels)):
            if j not in taken:
                expected[target.labels[j], 2] += 1
    counts = confusion_matrix(detections, targets, thresholds)
    assert np.array_equal(counts, expected)
    assert counts[:2].sum() == sum(len(target.labels) for target in targets)


def test_detections_in_a_crowd_are_no_confusion() -> None:
    target = truth(((0, 0, 100, 50), 0), (C, 1), crowd=(0,))
    counts = confusion_matrix([found((A, 1, 0.9), (C, 1, 0.8), (NOWHERE, 0, 0.7))], [target], [0.5, 0.5])
    assert counts.tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 0]]
