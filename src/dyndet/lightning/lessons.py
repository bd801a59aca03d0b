"""One pass over the training set, kept: what the router learns from does not change while it learns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch.utils.data import DataLoader

from dyndet.cli.out_of_memory import Work, explained
from dyndet.data.datamodule import DetectionDataModule
from dyndet.data.sampler import KeyedDataset, keyed_generator
from dyndet.lightning.lesson_files import LessonFile, joined
from dyndet.lightning.router_module import Lesson, learn
from dyndet.models.detectors.dynamic import DynamicDetector
from dyndet.structures import Category

CHUNK = 64
"""Batches that go into one file."""


def collect(
    detector: DynamicDetector, data: DetectionDataModule, *, passes: int, device: torch.device, folder: Path
) -> Lesson:
    """Runs both detectors over the training set.

    What is done is kept in `folder`, so that an interrupted pass goes on where it stopped and a finished one is read;
    what is damaged there is done again.
    Processes that start together each do all of it; those that start later find it done.

    Args:
        detector: goes to `device` and into eval mode.
        data: set up for fitting.
        passes: over the training set, each with its own random augmentation.
        device: to compute on.
        folder: for this detector and this data alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = len(data.train)
    keys = [(epoch, index) for epoch in range(passes) for index in range(images)]
    batches = [keys[i : i + data.batch_size] for i in range(0, len(keys), data.batch_size)]
    chunks = [batches[i : i + CHUNK] for i in range(0, len(batches), CHUNK)]
    files = [LessonFile(folder, number) for number in range(len(chunks))]
    lessons = {number: file.read(sum(map(len, chunks[number]))) for number, file in enumerate(files)}
    missing = [number for number, lesson in lessons.items() if lesson is None]
    if missing:
        detector.to(device).eval()
        detector.preprocess.train()  # the canvas is that of training
        dataset = KeyedDataset(data.train, data.train_transform, data.seed, data.train_mix)
        wanted = [batch for number in missing for batch in chunks[number]]
        loader = data.loader(dataset, batch_sampler=wanted)
        work = Work("the pass over the training set,")
        arriving = work.of(track(loader, description="both detectors on every training image"))
        with explained(work, lambda: f"set data.batch_size={max(data.batch_size // 2, 1)}, or a smaller data.size"):
            for number in missing:
                torch.manual_seed(data.seed + number)  # second stages draw samples
                lesson = joined([learn(detector, next(arriving).to(device)) for _ in chunks[number]])
                lessons[number] = files[number].write(lesson)
    return joined([lesson for lesson in lessons.values() if lesson is not None])


class Lessons:
    """Lessons as a training set.

    Args:
        lesson: of all N images, pooled (N, channels) and losses (2, N).
        categories: of the data.
    """

    def __init__(self, lesson: Lesson, categories: Sequence[Category]) -> None:
        self.lesson = lesson
        self.categories = list(categories)
        self.sizes = [(1, 1)] * len(self)

    def __len__(self) -> int:
        return len(self.lesson.pooled)

    def __getitem__(self, index: int) -> Lesson:
        return Lesson(self.lesson.pooled[index], self.lesson.losses[:, index])


class LessonDataModule(DetectionDataModule):
    """A data module whose training set are `Lessons`; everything else is as of `DetectionDataModule`."""

    def loader(self, dataset: KeyedDataset, *, replace: bool = True, **kwargs: Any) -> DataLoader[Any]:
        if isinstance(dataset.dataset, Lessons):
            batches = kwargs["batch_sampler"]
            return DataLoader(dataset, collate_fn=_batch, generator=keyed_generator(self.seed), batch_sampler=batches)
        return super().loader(dataset, replace=replace, **kwargs)


def _batch(lessons: Sequence[Lesson]) -> Lesson:
    return Lesson(torch.stack([item.pooled for item in lessons]), torch.stack([item.losses for item in lessons], 1))
