"""The validation split that is made where there is none, against an exhaustive search."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dyndet.data.layouts.holdout import _Deal, _grouped, held_out, original
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


@settings(max_examples=60, deadline=None)
@given(IMAGES, st.integers(0, 1000))
def test_every_class_is_on_both_sides_where_the_share_allows_it(classes: list[frozenset[int]], salt: int) -> None:
    names = [f"{salt}-{index}.jpg" for index in range(len(classes))]
    held = set(held_out(names, classes, 0.2))
    assert 0 < len(held) < len(names)
    most = max(1, round(0.24 * len(classes)))
    assert len(held) <= most
    sides = ({index for index in range(len(classes)) if bits >> index & 1} for bits in range(1, 2 ** len(classes) - 1))
    assert one_sided(classes, held) == min(one_sided(classes, side) for side in sides if len(side) <= most)


@settings(max_examples=50, deadline=None)
@given(IMAGES, st.randoms(use_true_random=False))
def test_the_order_of_files_does_not_matter(classes: list[frozenset[int]], shuffle: random.Random) -> None:
    pairs = [(f"image{index}.jpg", found) for index, found in enumerate(classes)]
    first = {pairs[index][0] for index in held_out([name for name, _ in pairs], classes, 0.3)}
    shuffle.shuffle(pairs)
    again = held_out([name for name, _ in pairs], [found for _, found in pairs], 0.3)
    assert {pairs[index][0] for index in again} == first


def drawn(seed: int, images: int, classes: int, objects: int) -> list[frozenset[int]]:
    """Classes as frequent as words of a language."""
    draw = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(classes)]
    return [frozenset(draw.choices(range(classes), weights, k=draw.randint(0, objects))) for _ in range(images)]


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_the_share_is_kept_about_and_every_class_is_on_both_sides(share: float) -> None:
    for seed in range(5):
        classes = drawn(seed, 400, 10, 3)
        held = set(held_out([f"{seed}/{index}.png" for index in range(400)], classes, share))
        assert 0.75 * share * 400 <= len(held) <= 1.2 * share * 400
        assert not one_sided(classes, held)


def test_images_stay_where_they_are_when_others_come() -> None:
    changed = 0
    for seed in range(5):
        classes = drawn(seed, 330, 6, 4)
        names = [f"{seed}/{index}.png" for index in range(330)]
        before = held_out(names[:300], classes[:300], 0.2)
        after = held_out(names, classes, 0.2)
        changed += len(set(before) ^ {index for index in after if index < 300})
    assert changed <= 10  # of 1500; a class may need it


@pytest.mark.parametrize(("images", "classes"), [(60, 120), (200, 400), (1000, 500)])
def test_classes_without_a_solution_do_not_take_long(images: int, classes: int) -> None:
    draw = random.Random(0)
    found: list[set[int]] = [set() for _ in range(images)]
    for label in range(classes):  # each in two images: nobody can have all on both sides
        for index in draw.sample(range(images), 2):
            found[index].add(label)
    deal = _Deal(_grouped([f"{index}.jpg" for index in range(images)], found), 0.2)
    deal.mend()
    assert deal.trials <= 40_000
    assert deal.images[True] <= 0.24 * images


def test_copies_of_an_image_stay_together() -> None:
    names = [f"shot{index}_jpg.rf.{copy * 7919 + index:032x}.jpg" for index in range(20) for copy in range(3)]
    held = set(held_out(names, [{0}] * 60, 0.2))
    assert {original(names[index]) for index in held}.isdisjoint(
        original(name) for index, name in enumerate(names) if index not in held
    )
    assert len(held) in (12, 15) and len(held) % 3 == 0
    assert (
        original("a/b_jpg.rf.0123abcd.jpg") == "a/b_jpg" and original("b_aug3.png") == "b" and original("b.jpg") == "b"
    )
    assert len(held_out([f"{index:04d}/rgb.png" for index in range(10)], [{0}] * 10, 0.2)) == 2


def test_what_cannot_be_split_is_said() -> None:
    for share in (0, 1, -1, 2):
        with pytest.raises(UserError, match=r"data\.val_share must lie between 0 and 1"):
            held_out(["a.jpg", "b.jpg"], [{0}, {0}], share)
    with pytest.raises(UserError, match=r"cannot be split"):
        held_out(["a.jpg"], [{0}], 0.2)
