"""A split as checks see it: what its annotations say, in flat arrays, without decoding images where that is known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dyndet.checkup.finding import Place
from dyndet.data.dataset import DetectionDataset
from dyndet.data.records import FileDataset, Repairs
from dyndet.structures import Category, Size


@dataclass(frozen=True)
class Split:
    """One split of a data set.

    Attributes:
        name: "train" or "val".
        dataset: to read images from.
        paths: of the N image files; "" where an image has none (generated ones).
        sizes: (N, 2) H, W as annotated.
        image: (M,) which image each box lies in.
        boxes: (M, 4) xyxy in pixels of the images on disk.
        labels: (M,) of the boxes.
        crowd: (M,) bool.
        repairs: what the reader mended.
        sized: (N,) bool, whether annotations say for which size they are.
        upright: whether images are turned by their EXIF orientation where that does not tell.
    """

    name: str
    dataset: DetectionDataset
    paths: list[str]
    sizes: NDArray[np.int64]
    image: NDArray[np.int64]
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    repairs: Repairs
    sized: NDArray[np.bool_]
    upright: bool

    @classmethod
    def of(cls, name: str, dataset: DetectionDataset) -> Split:
        """From any data set; those whose annotations are not at hand are decoded, image by image.

        Raises:
            DataError: if such an image cannot be read.
        """
        whole, chosen = _parts(dataset)
        paths: list[str] = []
        boxes, labels, crowd, sized = [], [], [], []
        for index in chosen:
            if isinstance(whole, FileDataset):
                record = whole.records[index]
                paths.append(str(record.path))
                sized.append(record.sized)
                found = (record.boxes, record.labels, record.crowd)
            else:
                target = whole[index].target
                paths.append(target.path)
                sized.append(False)
                found = (target.boxes.numpy(), target.labels.numpy(), target.crowd.numpy())
            for values, part in zip((boxes, labels, crowd), found, strict=True):
                values.append(part)
        counts = [len(item) for item in labels]
        return cls(
            name,
            dataset,
            paths,
            np.array(dataset.sizes, np.int64).reshape(-1, 2),
            np.repeat(np.arange(len(paths)), counts),
            np.concatenate(boxes).astype(np.float64) if boxes else np.zeros((0, 4)),
            np.concatenate(labels).astype(np.int64) if labels else np.zeros(0, np.int64),
            np.concatenate(crowd).astype(np.bool_) if crowd else np.zeros(0, np.bool_),
            _repairs(dataset, whole, chosen),
            np.array(sized, np.bool_),
            whole.upright if isinstance(whole, FileDataset) else True,
        )

    @property
    def categories(self) -> list[Category]:
        return self.dataset.categories

    @property
    def files(self) -> list[Path]:
        """Of the images that have one."""
        return [Path(path) for path in self.paths if path]

    def __len__(self) -> int:
        return len(self.paths)

    def size(self, index: int) -> Size:
        return int(self.sizes[index, 0]), int(self.sizes[index, 1])

    def at_image(self, index: int, more: str = "") -> Place:
        path = self.paths[index] or f"image {index}"
        return Place(self.name, int(index), path + (f": {more}" if more else ""))

    def at_box(self, box: int, more: str = "") -> Place:
        index = int(self.image[box])
        corners = ", ".join(f"{value:g}" for value in self.boxes[box].round(1))
        name = self.categories[self.labels[box]].name
        where = f"{self.paths[index] or f'image {index}'}: {name} [{corners}]{f' {more}' if more else ''}"
        return Place(self.name, index, where, (tuple(float(value) for value in self.boxes[box]),))


def read_splits(train: DetectionDataset, val: DetectionDataset) -> list[Split]:
    return [Split.of("train", train), Split.of("val", val)]


def _repairs(dataset: DetectionDataset, whole: DetectionDataset, chosen: range | list[int]) -> Repairs:
    """Of a part of a data set those of its images; of a whole one also those of images that were left out as empty."""
    if not isinstance(whole, FileDataset):
        return Repairs()
    return whole.repairs if dataset is whole else Repairs.of(whole.records[index] for index in chosen)


def annotations_at_hand(dataset: DetectionDataset) -> bool:
    """Whether they are known without decoding images."""
    return isinstance(_parts(dataset)[0], FileDataset)


def _parts(dataset: DetectionDataset) -> tuple[DetectionDataset, range | list[int]]:
    """What a `Subset` is taken from, and which of it; otherwise all of the data set."""
    inner, indices = getattr(dataset, "dataset", None), getattr(dataset, "indices", None)
    if inner is None or indices is None:
        return dataset, range(len(dataset))
    whole, chosen = _parts(inner)
    return whole, [chosen[index] for index in indices]
