"""Samples as loaders draw them: what goes wrong with a file travels as a value, never as an exception of a process.

An unusable image is replaced by another one, which depends on its index alone: the same whatever the number of workers,
and after every resumption. In evaluation it is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, get_worker_info

from dyndet.data.collate import Collate
from dyndet.data.quarantine import SKIP, Fault
from dyndet.data.sampler import Indexable, Key, KeyedDataset, keyed_generator
from dyndet.errors import DataError, UserError
from dyndet.structures import Batch, Sample

NOTHING = -1
"""A worker reads no file."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A sample, or why there is none.

    Attributes:
        sample: None if it was left out, or on an error.
        faults: files that were found to be unusable, whether replaced or left out.
        error: what ends the run.
    """

    sample: Sample | None
    faults: tuple[Fault, ...] = ()
    error: UserError | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """A batch, or why there is none; see `Drawn`."""

    batch: Any
    faults: tuple[Fault, ...] = ()
    error: UserError | None = None

    def pin_memory(self) -> Loaded:
        """Called by data loaders."""
        pinned = self.batch.pin_memory() if isinstance(self.batch, Batch) else self.batch
        return Loaded(pinned, self.faults, self.error)


class Drawing(Dataset[Drawn]):
    """Draws keyed samples, with a policy for files that cannot be used.

    Args:
        dataset: the samples by key.
        skip: whether unusable files are left out; otherwise the first is an error.
        replace: puts another image in the place of one that was left out, as training needs it.
        most: faults that are put up with; a sample that meets more is an error.
        workers: processes that draw: what each reads is seen from outside.
    """

    def __init__(
        self, dataset: KeyedDataset, *, skip: bool = False, replace: bool = True, most: int = 100, workers: int = 0
    ) -> None:
        self.dataset = dataset
        self.skip = skip
        self.replace = replace
        self.most = most
        # Index being read and index read last, by worker, in memory that all processes share.
        self.read = torch.full((workers, 2), NOTHING).share_memory_() if workers else None
        self._unusable: set[int] = set()  # known to this process: not read again

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key | int) -> Drawn:
        images = _Images(self)
        try:
            return Drawn(self.dataset.draw(images, key), tuple(images.faults))
        except _LeftOut:
            return Drawn(None, tuple(images.faults))
        except UserError as error:
            return Drawn(None, tuple(images.faults), error)
        except MemoryError:
            index = key[1] if isinstance(key, tuple) else key
            where = file_of(self.dataset.dataset, index)
            told = f"memory ran out while {where} was loaded: lower data.num_workers or data.batch_size"
            return Drawn(None, tuple(images.faults), DataError(told))

    def read_by(self, worker: int) -> str | None:
        """The file that a worker is reading; None between two."""
        return None if self.read is None else self._named(int(self.read[worker, 0]))

    def read_last_by(self, worker: int) -> str | None:
        return None if self.read is None else self._named(int(self.read[worker, 1]))

    def _named(self, index: int) -> str | None:
        return None if index == NOTHING else file_of(self.dataset.dataset, index)


class _LeftOut(Exception):  # noqa: N818 - no error
    """An image of an evaluation that cannot be used."""


class _Images:
    """The images of one sample: itself, and those that are mixed into it.

    Attributes:
        faults: what was found while it was drawn.
    """

    def __init__(self, drawing: Drawing) -> None:
        self._drawing = drawing
        self._dataset: Indexable[Sample] = drawing.dataset.dataset
        self.faults: list[Fault] = []

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        drawing = self._drawing
        if not drawing.skip:
            try:
                return self._read(index)
            except DataError as error:
                raise type(error)(f"{error}; {SKIP}", error.faults) from error
        tried = 0
        for place in self._places(index):
            if place in drawing._unusable:
                tried += 1
                continue
            try:
                return self._read(place)
            except DataError as error:
                tried += 1
                drawing._unusable.add(place)
                self.faults.append(Fault(file_of(self._dataset, place), " ".join(str(error).split())))
                if tried > drawing.most:
                    break
        if not drawing.replace:
            raise _LeftOut
        last = f" (the last: {self.faults[-1].reason})" if self.faults else ""
        raise DataError(
            f"{file_of(self._dataset, index)} cannot be used, nor can any of {tried - 1} others in its place{last}: "
            "mend the data, or allow more with a larger data.max_errors"
        )

    def _places(self, index: int) -> Iterator[int]:
        yield index
        if self._drawing.replace:
            order = torch.randperm(len(self), generator=keyed_generator(index)).tolist()
            yield from (place for place in order if place != index)

    def _read(self, index: int) -> Sample:
        info, table = get_worker_info(), self._drawing.read
        if info is None or table is None:
            return self._dataset[index]
        table[info.id, 0] = table[info.id, 1] = index
        try:
            return self._dataset[index]
        finally:
            table[info.id, 0] = NOTHING


class Gather:
    """From drawn samples to a batch, see `Loaded`.

    Args:
        collate: makes a batch of samples.
    """

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, drawn: Sequence[Drawn]) -> Loaded:
        faults = tuple(fault for item in drawn for fault in item.faults)
        error = next((item.error for item in drawn if item.error is not None), None)
        samples = [item.sample for item in drawn if item.sample is not None]
        if error is not None or not samples:
            return Loaded(None, faults, error)
        try:
            return Loaded(self.collate(samples), faults)
        except UserError as wrong:
            return Loaded(None, faults, wrong)


def file_of(dataset: object, index: int) -> str:
    """What image `index` is called in messages: its path, if it has one."""
    while (inner := getattr(dataset, "dataset", None)) is not None:
        indices = getattr(dataset, "indices", None)
        dataset, index = inner, index if indices is None else indices[index]
    records = getattr(dataset, "records", None)
    return f"image {index}" if records is None else str(records[index].path)
