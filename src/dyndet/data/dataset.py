"""What every dataset is: a sequence of `Sample`s with categories and known image sizes."""

from __future__ import annotations

from typing import Protocol

from dyndet.structures import Category, Sample, Size


class DetectionDataset(Protocol):
    """A finite, indexable detection set.

    Attributes:
        categories: label k of a target is `categories[k]`; original ids may have gaps.
        sizes: (H, W) of every image, known without decoding it (for grouping by aspect ratio).
    """

    categories: list[Category]
    sizes: list[Size]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...
