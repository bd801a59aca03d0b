"""A validation split where a data set has none: always the same, with every class on both sides.

Iterative stratification (Sechidis et al., 2011, "On the stratification of multi-label data"): the rarest class is
dealt out first. There is no seed and no order of files in it, only file names and classes.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePath

from dyndet.errors import UserError

# Roboflow names augmented copies x_jpg.rf.HASH.jpg, others x_aug3.jpg: copies of an image stay on one side.
_COPY = re.compile(r"(?:\.rf\.[0-9a-zA-Z]+|[_-]aug(?:mented)?[_-]?\d*)$")

_CHAIN, _HOLDERS = 3, 12
_EMPTY = -1  # images without objects are dealt out like a class


def original(name: str) -> str:
    """The stem of an image file without what marks an augmented copy."""
    return _COPY.sub("", PurePath(name).stem)


def held_out(names: Sequence[str], classes: Sequence[Iterable[int]], share: float) -> list[int]:
    """Which images validate, ascending.

    A class that only one image (with its augmented copies) has trains.

    Args:
        names: file names; folders do not matter.
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
    deal.out()
    deal.mend()
    return sorted(index for group in groups if group.validates for index in group.images)


@dataclass(eq=False)
class _Group:
    """Copies of one image."""

    name: str
    images: list[int]
    classes: frozenset[int]
    validates: bool | None = None


def _grouped(names: Sequence[str], classes: Sequence[Iterable[int]]) -> list[_Group]:
    images: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        images[original(name)].append(index)
    groups = [
        _Group(name, members, frozenset().union(*(classes[index] for index in members)) or frozenset({_EMPTY}))
        for name, members in images.items()
    ]
    # Neighbouring names are often neighbouring moments: hashes mix them, the same way everywhere.
    return sorted(groups, key=lambda group: hashlib.blake2b(group.name.encode(), digest_size=16).digest())


class _Deal:
    def __init__(self, groups: Sequence[_Group], share: float) -> None:
        self.groups = groups
        total = sum(len(group.images) for group in groups)
        self.counts = Counter(label for group in groups for label in group.classes)
        self.wanted = {
            label: min(max(round(share * count), 1), count - 1) if count > 1 else 0
            for label, count in self.counts.items()
        }
        self.validating = Counter[int]()
        self.training = Counter[int]()
        self.room = min(max(share * total, 1), total - 1)  # images that may still validate
        self.rest = total - self.room

    def out(self) -> None:
        """Gives every group a side: of the rarest class first, to the side that lacks more of it."""
        for label, count in sorted(self.counts.items(), key=lambda item: (item[1], item[0])):
            for group in self.groups:
                if group.validates is not None or label not in group.classes:
                    continue
                lacks_val = self.wanted[label] - self.validating[label]
                lacks_train = count - self.wanted[label] - self.training[label]
                more = (lacks_val - lacks_train) or (self.room - self.rest)
                self._put(group, validates=more > 0 and lacks_val > 0)
        for validates in (True, False):
            if all(group.validates != validates for group in self.groups):  # every class has one image, say
                self._move(min(self.groups, key=lambda group: (len(group.classes - {_EMPTY}), len(group.images))))

    def mend(self) -> None:
        """Brings classes to a side that lacks them, by up to `_CHAIN` moves where one takes another class away."""
        while missing := self._missing():
            if not any(self._chain(len(missing), length) for length in range(1, _CHAIN + 1)):
                return

    def _chain(self, missing: int, length: int) -> bool:
        """Makes up to so many moves after which fewer are missing; none if there are no such."""
        for label, validates in self._missing():
            holders = (group for group in self.groups if label in group.classes and group.validates != validates)
            for group in list(islice(holders, _HOLDERS)):
                self._move(group)
                if len(self._missing()) < missing or (length > 1 and self._chain(missing, length - 1)):
                    return True
                self._move(group)
        return False

    def _missing(self) -> list[tuple[int, bool]]:
        """Classes of several groups that a side has not, with that side: whether it validates."""
        return [
            (label, validates)
            for label in sorted(self.counts)
            if self._splits(label)
            for validates, side in ((True, self.validating), (False, self.training))
            if not side[label]
        ]

    def _splits(self, label: int) -> bool:
        return label != _EMPTY and self.counts[label] > 1

    def _move(self, group: _Group) -> None:
        here, there = (self.validating, self.training) if group.validates else (self.training, self.validating)
        here.subtract(group.classes)
        there.update(group.classes)
        size = len(group.images) if group.validates else -len(group.images)
        self.room, self.rest, group.validates = self.room + size, self.rest - size, not group.validates

    def _put(self, group: _Group, *, validates: bool) -> None:
        group.validates = validates
        (self.validating if validates else self.training).update(group.classes)
        if validates:
            self.room -= len(group.images)
        else:
            self.rest -= len(group.images)
