"""A validation split where a data set has none: by names, with every class on both sides.

A hash of its name deals an image, so that it stays where it is when others come. The few that are moved afterwards
bring classes to a side that lacks them. There is no seed and no order of files in it.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from dyndet.errors import UserError

# Roboflow names augmented copies x_jpg.rf.HASH.jpg, others x_aug3.jpg: copies of an image stay on one side.
_COPY = re.compile(r"(?:\.rf\.[0-9a-zA-Z]+|[_-]aug(?:mented)?[_-]?\d*)$")

_SPREAD = 0.2  # how far the share may be off before images are moved for it
_CHAIN, _HOLDERS, _TRIALS, _MOST_TRIALS = 4, 12, 1000, 40_000
_HASH = 8  # bytes


def original(name: str) -> str:
    """An image file without suffix and what marks an augmented copy; with its folders: `0001/rgb.png` is another."""
    return _COPY.sub("", os.path.splitext(name)[0])  # noqa: PTH122 - of many names


def held_out(names: Sequence[str], classes: Sequence[Iterable[int]], share: float) -> list[int]:
    """Which images validate, ascending: `share` of them, a fifth of that more or less.

    A class that only one image (with its augmented copies) has trains or validates by chance. One of several is on both
    sides, where moving a few images can do that.

    Args:
        names: files with their folders below that of the set, which does not matter.
        classes: the classes in each image.
        share: of the images that validate, 0..1.

    Raises:
        UserError: if `share` leaves nothing on one side, or there are no two images.
    """
    if not 0 < share < 1:
        raise UserError(f"data.val_share must lie between 0 and 1, got {share} (data.val_split=all validates on all)")
    groups = _grouped(names, classes)
    if len(groups) < 2:
        raise UserError(
            f"{len(names)} image(s) of one origin cannot be split into training and validation: add images, or give "
            "validation images of their own"
        )
    deal = _Deal(groups, share)
    deal.mend()
    return sorted(index for group in groups if group.validates for index in group.images)


@dataclass(eq=False)
class _Group:
    """Copies of one image; `place` is where its hash lies in 0..1."""

    place: float
    images: list[int]
    classes: frozenset[int]
    validates: bool


def _grouped(names: Sequence[str], classes: Sequence[Iterable[int]]) -> list[_Group]:
    images: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        images[original(name)].append(index)
    groups = [
        _Group(_place(name), members, frozenset().union(*(classes[index] for index in members)), validates=False)
        for name, members in images.items()
    ]
    return sorted(groups, key=lambda group: group.place)


def _place(name: str) -> float:
    """Neighbouring names are often neighbouring moments: hashes mix them, the same way everywhere."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=_HASH).digest()) / 256**_HASH


class _Deal:
    """Groups in the order of their places, and what each side has of each class."""

    def __init__(self, groups: Sequence[_Group], share: float) -> None:
        self.groups = groups
        total = sum(len(group.images) for group in groups)
        wanted = min(max(round(share * total), 1), total - 1)
        self.most = max(wanted, round((1 + _SPREAD) * share * total))
        least = min(wanted, math.ceil((1 - _SPREAD) * share * total))
        self.counts = Counter(label for group in groups for label in group.classes)
        self.sides = {True: Counter[int](), False: self.counts.copy()}
        self.images = {True: 0, False: total}
        self.holders: dict[int, list[_Group]] = defaultdict(list)
        for group in groups:
            for label in group.classes:
                self.holders[label].append(group)
        self.lacking = {(label, True) for label, count in self.counts.items() if count > 1}
        self.trials = 0
        for group in groups:
            if group.place < share and self.images[False] > len(group.images):
                self._move(group)
        for group in reversed(groups):
            if group.validates and self.most < self.images[True] > len(group.images):
                self._move(group)
        for group in groups:
            size = self.images[True] + len(group.images)
            if not group.validates and self.images[True] < least and (size <= self.most or not self.images[True]):
                self._move(group)

    def mend(self) -> None:
        """Brings classes to a side that lacks them, the rarest first, in up to `_CHAIN` moves each."""
        before = len(self.lacking) + 1
        while len(self.lacking) < before:
            before = len(self.lacking)
            for lack in sorted(self.lacking, key=lambda lack: (self.counts[lack[0]], lack)):
                if lack in self.lacking:
                    stop, start = min(self.trials + _TRIALS, _MOST_TRIALS), frozenset(self.lacking)
                    any(self._bring(lack, length, start, stop) for length in range(1, _CHAIN + 1))

    def _bring(self, lack: tuple[int, bool], length: int, start: frozenset[tuple[int, bool]], stop: int) -> bool:
        """Moves one that has the class over, and up to `length` - 1 others to mend what that spoils; all is as it was
        if it cannot be done with fewer classes lacking than at the start.
        """
        label, validates = lack
        holders = (group for group in self.holders[label] if group.validates != validates)
        return any(self._try(group, length, start, stop) for group in list(islice(holders, _HOLDERS)))

    def _try(self, group: _Group, length: int, start: frozenset[tuple[int, bool]], stop: int) -> bool:
        if self.trials >= stop:
            return False
        self.trials += 1
        self._move(group)
        if len(self.lacking) < len(start) and 0 < self.images[True] <= self.most and self.images[False]:
            return True
        if length > 1:
            spoilt = sorted(self.lacking - start)
            if any(self._bring(lack, length - 1, start, stop) for lack in spoilt):
                return True
            if self.images[True] > self.most:
                back = (other for other in reversed(self.groups) if other.validates and other is not group)
                if any(self._try(other, length - 1, start, stop) for other in list(back)):
                    return True
        self._move(group)
        return False

    def _move(self, group: _Group) -> None:
        """To the other side."""
        here, there = group.validates, not group.validates
        for label in group.classes:
            self.sides[here][label] -= 1
            self.sides[there][label] += 1
            if self.counts[label] > 1:
                self.lacking.discard((label, there))
                if not self.sides[here][label]:
                    self.lacking.add((label, here))
        self.images[here] -= len(group.images)
        self.images[there] += len(group.images)
        group.validates = there
