"""What a data set holds, as a number: whatever was computed from it is stale when this changes."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from typing import Any

import numpy as np
from torch import Tensor

from dyndet.data.datamodule import Subset
from dyndet.data.dataset import DetectionDataset
from dyndet.data.records import FileDataset
from dyndet.data.shapes import ShapesDataset


def content_key(dataset: DetectionDataset) -> str:
    """A digest of the list of images, their annotations and their files' sizes and times.

    Files are not read. Generated shapes count by their arguments. Of any other data set every sample is read once:
    nothing else is known of it.

    Args:
        dataset: any.
    """
    digest = hashlib.blake2b(digest_size=16)
    _add(digest, dataset)
    return digest.hexdigest()


def _add(digest: Any, dataset: DetectionDataset) -> None:
    kind = type(dataset)
    _put(digest, kind.__module__, kind.__qualname__, len(dataset), dataset.categories)
    if isinstance(dataset, Subset):
        _put(digest, dataset.indices)
        _add(digest, dataset.dataset)
    elif isinstance(dataset, ShapesDataset) and kind is ShapesDataset:
        _put(digest, dataset.size, dataset.seed, dataset.hard_fraction, dataset.load_masks)
    elif isinstance(dataset, FileDataset):
        _put(digest, dataset.load_masks)
        for record in dataset.records:
            _put(digest, *(getattr(record, field.name) for field in fields(record)))
            state = record.path.stat() if record.path.is_file() else None
            _put(digest, state and (state.st_size, state.st_mtime_ns))
    else:
        for index in range(len(dataset)):
            sample = dataset[index]
            _put(digest, sample.image, *(getattr(sample.target, field.name) for field in fields(sample.target)))


def _put(digest: Any, *values: Any) -> None:
    for value in values:
        array = value.numpy(force=True) if isinstance(value, Tensor) else value
        if isinstance(array, np.ndarray):
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        else:
            digest.update(repr(value).encode())
        digest.update(b"\0")
