"""A look at a whole dataset before it is trained on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from dyndet.data.dataset import DetectionDataset
from dyndet.data.records import Repairs
from dyndet.errors import DataError

SMALL, LARGE = 32**2, 96**2
"""Areas in square pixels between COCO's small, medium and large objects."""


@dataclass
class Report:
    """What `examine` found.

    Attributes:
        total: images of the dataset.
        images: images that were examined and could be decoded.
        boxes: boxes in them, crowd regions not counted.
        crowd: crowd regions.
        empty: images without a box (crowd regions not counted).
        per_category: boxes by category name; categories without any are there with 0.
        sizes: boxes by "small", "medium", "large" (COCO's areas, in pixels on disk).
        undecodable: why each of the other images could not be read.
        repairs: boxes mended when the annotations were read.
    """

    total: int = 0
    images: int = 0
    boxes: int = 0
    crowd: int = 0
    empty: int = 0
    per_category: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    undecodable: list[str] = field(default_factory=list)
    repairs: Repairs = field(default_factory=Repairs)

    def __str__(self) -> str:
        missing = [name for name, count in self.per_category.items() if not count]
        lines = [
            f"images       {self.images} of {self.total} ({self.empty} without boxes)",
            f"boxes        {self.boxes} (and {self.crowd} crowd regions)",
            "sizes        " + ", ".join(f"{self.sizes[name]} {name}" for name in ("small", "medium", "large")),
            "categories   " + ", ".join(f"{name} {count}" for name, count in self.per_category.most_common() if count),
            f"without any  {', '.join(missing) or 'none'}",
            f"mended       {self.repairs}",
            f"undecodable  {len(self.undecodable)}",
        ]
        return "\n".join(lines + [f"  {reason}" for reason in self.undecodable])


def examine(dataset: DetectionDataset, *, max_images: int | None = None) -> Report:
    """Decodes all images, or `max_images` evenly spread ones, and counts; unreadable ones are listed, not raised."""
    total = len(dataset)
    count = total if max_images is None else min(max_images, total)
    names = [category.name for category in dataset.categories]
    repairs = getattr(dataset, "repairs", None) or Repairs()
    report = Report(total=total, per_category=Counter(dict.fromkeys(names, 0)), repairs=repairs)
    for position in range(count):
        try:
            target = dataset[position * total // count].target
        except DataError as error:
            report.undecodable.append(str(error))
            continue
        report.images += 1
        report.crowd += int(target.crowd.sum())
        target = target.without_crowd()
        report.boxes += len(target.boxes)
        report.empty += not len(target.boxes)
        report.per_category.update(names[label] for label in target.labels.tolist())
        areas = (target.boxes[:, 2:] - target.boxes[:, :2]).prod(1) if target.area is None else target.area
        report.sizes.update(_size(area) for area in areas.tolist())
    return report


def _size(area: float) -> str:
    return "small" if area < SMALL else "medium" if area < LARGE else "large"
