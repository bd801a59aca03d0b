"""The validation split that is made where there is none, against an exhaustive search."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dyndet.data.layouts.holdout import held_out, original
from dyndet.errors import UserError

IMAGES = st.lists(st.frozensets(st.integers(0, 4), max_size=3), min_size=2, max_size=9)


def one_sided(classes: list[frozenset[int]], held: set[int]) -> int:
    """Classes of two images and more that a side lacks."""
    count = 0
    for label in set().union(*classes):
        holders = [index for index, found in enumerate(classes) if label in found]
        inside = sum(index in held for index in holders)
        count += len(holders) > 1 and inside in (0, len(holders))
    return count


@settings(max_examples=150, deadline=None)
@given(IMAGES, st.integers(0, 1000))
def test_every_class_is_on_both_sides_where_that_is_possible(classes: list[frozenset[int]], salt: int) -> None:
    names = [f"{salt}-{index}.jpg" for index in range(len(classes))]
    held = set(held_out(names, classes, 0.2))
    assert 0 < len(held) < len(names)
    sides = ({index for index in range(len(classes)) if bits >> index & 1} for bits in range(1, 2 ** len(classes) - 1))
    assert one_sided(classes, held) == min(one_sided(classes, side) for side in sides)


@settings(max_examples=50, deadline=None)
@given(IMAGES, st.randoms(use_true_random=False))
def test_the_order_of_files_and_their_folders_do_not_matter(
    classes: list[frozenset[int]], shuffle: random.Random
) -> None:
    pairs = [(f"image{index}.jpg", found) for index, found in enumerate(classes)]
    first = {pairs[index][0] for index in held_out([name for name, _ in pairs], classes, 0.3)}
    shuffle.shuffle(pairs)
    again = held_out([f"/elsewhere/{name}" for name, _ in pairs], [found for _, found in pairs], 0.3)
    assert {pairs[index][0] for index in again} == first


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_the_share_is_kept_for_images_and_for_every_class(share: float) -> None:
    draw = random.Random(3)
    classes = [frozenset(draw.choices(range(6), [32, 16, 8, 4, 2, 1], k=draw.randint(0, 3))) for _ in range(400)]
    held = set(held_out([f"{index}.png" for index in range(400)], classes, share))
    assert abs(len(held) - share * 400) <= 10
    for label in range(6):
        holders = {index for index in range(400) if label in classes[index]}
        assert abs(len(holders & held) - share * len(holders)) <= 2


def test_copies_of_an_image_stay_together() -> None:
    names = [f"shot{index}_jpg.rf.{copy * 7919 + index:032x}.jpg" for index in range(20) for copy in range(3)]
    held = set(held_out(names, [{0}] * 60, 0.2))
    assert {original(names[index]) for index in held}.isdisjoint(
        original(name) for index, name in enumerate(names) if index not in held
    )
    assert len(held) == 12
    assert original("a/b_jpg.rf.0123abcd.jpg") == "b_jpg" and original("b_aug3.png") == "b" and original("b.jpg") == "b"


def test_what_cannot_be_split_is_said() -> None:
    for share in (0, 1, -1, 2):
        with pytest.raises(UserError, match=r"data\.val_share must lie between 0 and 1"):
            held_out(["a.jpg", "b.jpg"], [{0}, {0}], share)
    with pytest.raises(UserError, match=r"cannot be split"):
        held_out(["a.jpg"], [{0}], 0.2)
