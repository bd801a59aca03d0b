"""What recognising a folder gives: its format, its layout, and how each of its splits is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dyndet.data.records import FileDataset

Format = Literal["coco", "yolo", "voc"]
Reader = Callable[..., FileDataset]
"""Called with `load_masks` and `skip_empty`."""

ALL = "all"
"""The only split of a folder that has none."""

_WORDS = {
    "train": "train", "training": "train", "trn": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test", "tst": "test",
}  # fmt: skip


@dataclass
class Found:
    """A recognised folder.

    Attributes:
        format: "coco", "yolo" or "voc".
        layout: what was seen, for people.
        splits: how each is read: "train", "val" and "test" under these names whatever the folder calls them, others
            under their own; a folder without splits has `ALL` alone.
        places: where each split lies, for people.
        notes: what was taken otherwise than written, or left out.
        choice: the key that chooses among several, e.g. "data.config=FILE.yaml".
    """

    format: Format
    layout: str
    splits: dict[str, Reader]
    places: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    choice: str = ""


@dataclass(frozen=True)
class Wanted:
    """What the user set by hand.

    Attributes:
        config: the yaml of a YOLO set.
        annotations: the COCO json by split.
        images: the folder of its images by split.
        classes: names to keep, in label order.
        rooted: whether the folder was named, not derived from a file: then it comes first.
    """

    config: Path | None = None
    annotations: dict[str, Path] = field(default_factory=dict)
    images: dict[str, Path] = field(default_factory=dict)
    classes: Sequence[str] | None = None
    rooted: bool = True


def split_word(name: str) -> str | None:
    """The split that a name speaks of: "val" for "instances_val2017", "valid" and "Validation"; None if of none."""
    words = re.findall(r"[a-z]+", name.lower())
    return next((_WORDS[word] for word in words if word in _WORDS), None)


def split_of(path: Path, root: Path) -> str | None:
    """The split that a path below `root` speaks of, its innermost word first."""
    parts = reversed(path.relative_to(root).parts) if path.is_relative_to(root) else [path.name]
    return next((word for part in parts if (word := split_word(part))), None)


def listed(items: Sequence[object], most: int = 4) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(str(item) for item in items[:most]) + more
