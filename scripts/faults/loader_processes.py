"""R11: loader processes that are killed or hang, at several moments."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from dyndet.data import loader
from dyndet.data.datamodule import DetectionDataModule
from dyndet.data.shapes import ShapesDataset
from dyndet.data.transforms import RandomHorizontalFlip
from dyndet.errors import DataError
from dyndet.structures import Batch, Sample
from faults.row import Outcome, Row

IMAGES, BATCH = 24, 4
LIMIT = 60.0
"""Seconds within which every case ends, on a loaded machine."""

ENDS: dict[str, Callable[[], object]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "ended": lambda: os._exit(3),
    "segmentation fault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "a read that never returns": lambda: time.sleep(10_000),
}


@dataclass
class Deadly:
    """Generated images, one of which ends or stops the process that loads it.

    Attributes:
        images: what it is otherwise.
        index: the image.
        flags: a file per time that it has happened.
        times: how often it happens.
        end: what happens.
    """

    images: ShapesDataset
    index: int
    flags: Path
    times: int
    end: Callable[[], object]

    def __post_init__(self) -> None:
        self.categories, self.sizes = self.images.categories, self.images.sizes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        if index == self.index and torch.utils.data.get_worker_info() is not None:
            for number in range(self.times):
                flag = self.flags / str(number)
                if not flag.exists():
                    flag.touch()
                    self.end()
                    break
        return self.images[index]


def data_of(train: Any, workers: int) -> DetectionDataModule:
    data = DetectionDataModule(
        train=train,
        val=partial(ShapesDataset, length=4, size=32),
        batch_size=BATCH,
        num_workers=workers,
        train_transform=[RandomHorizontalFlip()],
    )
    data.timeout = 3
    data.setup()
    return data


def images() -> ShapesDataset:
    return ShapesDataset(length=IMAGES, size=32)


def epoch(
    data: DetectionDataModule, after: Callable[[int], None] = lambda number: None, passes: int = 1
) -> list[Batch]:
    found = []
    train = data.train_dataloader()
    for number, batch in enumerate(batch for _ in range(passes) for batch in train):
        found.append(batch)
        after(number)
    return found


def same(ones: list[Batch], others: list[Batch]) -> bool:
    return len(ones) == len(others) and all(
        torch.equal(one.images.pixels, other.images.pixels)
        and [target.image_id for target in one.targets] == [target.image_id for target in other.targets]
        for one, other in zip(ones, others, strict=True)
    )


@contextmanager
def warnings_heard() -> Iterator[list[str]]:
    """What the loader warns of; a stopped process is given up at once."""
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    before, loader.STOPPED = loader.STOPPED, 1
    loader.logger.addHandler(handler)
    try:
        yield heard
    finally:
        loader.logger.removeHandler(handler)
        loader.STOPPED = before


def _once(folder: Path) -> Iterator[Outcome]:
    """While a file is read: all goes on at the same batch, and the image is named."""
    whole = epoch(data_of(images(), 0))
    for number, (workers, place, (how, end)) in enumerate(product((2, 1), (0, 9, 23), ENDS.items())):
        flags = folder / str(number)
        flags.mkdir()
        index = whole[place // BATCH].targets[place % BATCH].image_id
        with warnings_heard() as heard:
            started = time.monotonic()
            found = epoch(data_of(Deadly(images(), index, flags, 1, end), workers))
            seconds = time.monotonic() - started
        fine = same(found, whole) and len(heard) == 1 and f"reading image {index}" in heard[0] and seconds < LIMIT
        yield Outcome(f"{how} at image {place + 1}, {workers} workers", fine, f"{heard}, {seconds:.0f} s")


def _twice(folder: Path) -> Iterator[Outcome]:
    """The second time in a pass: one line that names the image and says what to do."""
    for number, (workers, (how, end)) in enumerate(product((2, 1), ENDS.items())):
        flags = folder / str(number)
        flags.mkdir()
        case = f"{how}, {workers} workers"
        with warnings_heard():
            try:
                found = epoch(data_of(Deadly(images(), 11, flags, 2, end), workers))
                yield Outcome(case, False, f"{len(found)} batches")
            except DataError as error:
                said = str(error)
                fine = said.count("reading image 11") == 2 and "\n" not in said and "data.num_workers" in said
                yield Outcome(case, fine, said)


def _between(folder: Path) -> Iterator[Outcome]:
    """From outside, between two batches; in the second epoch, too."""
    whole = epoch(data_of(images(), 0), passes=2)
    for workers, sent, moment in product((2, 1), (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP), (0, 2, 4, 5, 7)):

        def strike(number: int, moment: int = moment, sent: signal.Signals = sent) -> None:
            if number == moment:
                os.kill(multiprocessing.active_children()[0].pid or 0, sent)

        with warnings_heard() as heard:
            found = epoch(data_of(images(), workers), strike, passes=2)
        case = f"{sent.name} after batch {moment + 1}, {workers} workers"
        # What the process had loaded before may be all that was left for it.
        yield Outcome(case, same(found, whole) and len(heard) <= 1, str(heard))
        for child in multiprocessing.active_children():
            child.kill()


ROWS = [
    Row(
        "R11.1",
        "a loader process is killed, crashes, is stopped or hangs while it reads an image",
        "the image is named, all processes start again, and the batches are bit for bit the same",
        _once,
        110,
    ),
    Row("R11.2", "the same happens twice in an epoch", "one line with the image and advice", _twice, 50),
    Row(
        "R11.3",
        "a loader process is killed, ended or stopped between two batches of two epochs, or between these",
        "the batches are bit for bit the same",
        _between,
        60,
    ),
]
