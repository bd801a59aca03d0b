"""`dyndet predict ckpt=FILE source=IMAGES`: what is found in images and videos, as files and pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, ListConfig
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from dyndet.api import detector_from
from dyndet.checkpoints.read import Checkpoint, read_checkpoint
from dyndet.cli.command import run
from dyndet.cli.compose import build
from dyndet.cli.device import device_of
from dyndet.data.collate import Collate
from dyndet.data.images import read_image
from dyndet.data.sources import Source, find_sources, unlabelled
from dyndet.data.transforms import Compose
from dyndet.data.video import Video, VideoWriter
from dyndet.errors import DataError, UserError
from dyndet.metrics.compute import ComputeMeter
from dyndet.metrics.formats import CocoWriter, CsvWriter, JsonWriter, Prediction, Writer, YoloWriter
from dyndet.metrics.static import StaticCosts, meter_batch
from dyndet.metrics.wanted import Wanted
from dyndet.report.draw import DRAWN_FROM, draw_detections
from dyndet.report.gate_maps import preview, summary
from dyndet.report.style import captioned
from dyndet.routing import Routes, Routing
from dyndet.signals import Interrupted, forget
from dyndet.structures import Detections, Sample

_FORMATS: dict[str, Callable[..., Writer]] = {
    "json": JsonWriter, "coco": CocoWriter, "yolo": YoloWriter, "csv": CsvWriter,
}  # fmt: skip


def predict(config: DictConfig) -> Path:
    """Runs a checkpoint over images and videos and returns the folder with the results.

    What cannot be read is reported and left out. An interruption keeps what was found; of a camera it is the end.

    Raises:
        UserError: on wrong settings.
        SystemExit: with code 130 or 143 when interrupted, with 3 if there is nothing but files that cannot be read.
    """
    saved = read_checkpoint(config.ckpt, trust=config.trust)
    given = list(config.source) if isinstance(config.source, ListConfig) else config.source
    sources = find_sources(given, leave_out=Path(config.out) / "pictures")
    endless, interrupted, code = sources[0].kind == "camera", False, 0
    with ExitStack() as stack:
        job = _Job(config, saved, sources, stack)
        try:
            for source in sources:
                job.run(source)
        except (KeyboardInterrupt, Interrupted) as error:
            interrupted, code = True, getattr(error, "code", 130)
            forget()
    if job.done:
        job.print_summary()
    if interrupted and not endless:
        print(f"interrupted after {job.done} images and {job.skipped} that were skipped", file=sys.stderr)
        raise SystemExit(code)
    if not job.done and not interrupted:
        print(
            f"error: source={config.source}: none of {len(sources)} files can be read, see above why", file=sys.stderr
        )
        raise SystemExit(3)
    return job.folder


class _Job:
    """A detector, what is asked of it, and where the answers go.

    Args:
        config: of the command.
        saved: the checkpoint.
        sources: all of them.
        stack: closes files when it is left.

    Attributes:
        folder: of all that is written.
        done: how many images and frames were read.
        skipped: how many files were not, or not to their end.
    """

    def __init__(self, config: DictConfig, saved: Checkpoint, sources: Sequence[Source], stack: ExitStack) -> None:
        self.done = self.skipped = 0
        self.folder = Path(config.out)
        self._config, self._names = config, [category.name for category in saved.categories]
        self._wanted = Wanted(
            saved.categories,
            score_threshold=config.score_threshold,
            classes=None if config.classes is None else _listed(config.classes),
            agnostic_nms=config.agnostic_nms,
            max_detections=config.max_detections,
        )
        for key in ("frame_step", "max_frames"):
            if config[key] is not None and (type(config[key]) is not int or config[key] < 1):
                raise UserError(f"{key}={config[key]}: give a whole number from 1")
        self._suffix = _suffix(config.pictures)
        formats = _listed(config.formats)
        for name in formats:
            if name not in _FORMATS:
                raise UserError(f"formats={name}: choose from {', '.join(_FORMATS)}, for instance formats=[json,csv]")
        device = device_of(config.device)
        self._detector = detector_from(saved, impl=config.impl, speed=config.speed, fuse=config.fuse).to(device)
        self._transform = Compose([build(item) for item in saved.config.data.module.val_transform])
        self._collate = Collate(self._detector.preprocess.pad_multiple)
        self._static, self._meter = StaticCosts(self._detector), ComputeMeter(strides=self._detector.strides)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._writers = [
            stack.enter_context(closing(_FORMATS[name](self.folder, saved.categories, sources))) for name in formats
        ]
        self._progress = stack.enter_context(_progress())
        self._task = self._progress.add_task("predict", total=len(sources))

    def run(self, source: Source) -> None:
        """Looks at all there is of it; says so if it cannot be read."""
        try:
            if source.kind == "image":
                self._image(source)
            else:
                self._video(source)
        except DataError as error:
            self.skipped += 1
            for writer in self._writers:
                writer.failed(source.path, str(error))
            self._progress.console.print(f"skipped: {error}", markup=False, highlight=False, soft_wrap=True)
        self._progress.advance(self._task)

    def print_summary(self) -> None:
        spent = self._meter.compute().total
        print(f"GMAC per image: mean {spent.mean / 1e9:.3f}, max {spent.max / 1e9:.3f}, min {spent.min / 1e9:.3f}")
        written = [*(["pictures"] if self._suffix else []), *(writer.file.name for writer in self._writers)]
        counts = f"{self.done} images and frames, {self.skipped} skipped"
        print(f"{counts}: {', '.join(written) or 'nothing'} in {self.folder}")

    def _image(self, source: Source) -> None:
        image = read_image(source.path)
        found, picture = self._look(image, source.path)
        file = None
        if picture is not None:
            file = self.folder / "pictures" / f"{source.name}.{self._suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file, quality=90)  # of JPEG
        self._write(source, found, image, {}, file)

    def _video(self, source: Source) -> None:
        with Video(source, step=self._config.frame_step or 1) as video, ExitStack() as stack:
            more = None if video.length is None else min(video.length, self._config.max_frames or video.length)
            total = self._progress.tasks[self._task].total
            self._progress.update(self._task, total=None if more is None or total is None else total + more)
            drawing, file = None, None
            for frame in islice(video, self._config.max_frames):
                found, picture = self._look(frame.image, source.path)
                if picture is not None:
                    file = self.folder / "pictures" / f"{source.name}.mp4"
                    drawing = drawing or stack.enter_context(VideoWriter(file, video.rate))
                    drawing.write(picture)
                self._write(source, found, frame.image, {"frame": frame.number, "seconds": frame.seconds}, file)
                self._progress.advance(self._task)

    def _look(self, image: Tensor, path: str) -> tuple[_Seen, Image.Image | None]:
        """What is found, and, if wanted, how it looks."""
        sample = self._transform(unlabelled(image, path), torch.Generator())
        (found,), routing = self._detector.detect_with_routing(self._collate([sample]).images)
        (macs,) = meter_batch(self._meter, self._static, routing, [sample.image.shape[-2:]])
        found = self._wanted(replace(found.to("cpu"), macs=macs))
        return _Seen(found, routing), self._picture(image, sample, found, routing) if self._suffix else None

    def _picture(
        self, image: Tensor, sample: Sample, found: Detections, routing: Routing | Routes | None
    ) -> Image.Image:
        threshold = DRAWN_FROM if self._config.score_threshold is None else self._config.score_threshold
        if self._config.gates:
            return preview(
                sample.image, None, found, routing, names=self._names, strides=self._detector.strides,
                original_size=sample.target.original_size, score_threshold=threshold,
            )  # fmt: skip
        picture = draw_detections(image, found, self._names, score_threshold=threshold)
        return captioned(picture, f"detections {summary(found, routing, score_threshold=threshold)}")

    def _write(self, source: Source, seen: _Seen, image: Tensor, frame: dict[str, Any], picture: Path | None) -> None:
        size = (image.shape[1], image.shape[2])
        macs = seen.found.macs or 0.0
        item = Prediction(
            source.path, source.name, self.done + self.skipped, size, seen.found, macs / 1e9, _way(seen.routing), frame,
            None if picture is None else str(picture),
        )  # fmt: skip
        for writer in self._writers:
            writer.write(item)
        self.done += 1


class _Seen(NamedTuple):
    found: Detections
    routing: Routing | Routes | None


def _suffix(pictures: Any) -> str | None:
    if pictures in (False, None):
        return None
    suffix = "jpg" if pictures is True else str(pictures).lower()
    if suffix not in ("jpg", "png"):
        raise UserError(f"pictures={pictures}: choose jpg, png or false")
    return suffix


def _listed(value: Any) -> list[str]:
    return [] if value is None else [str(item) for item in value] if isinstance(value, ListConfig) else [str(value)]


def _progress() -> Progress:
    """On stderr, so that what is printed can be used."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def _way(routing: Routing | Routes | None) -> dict[str, Any]:
    """Through a dynamic detector, of a single image."""
    if not isinstance(routing, Routes):
        return {}
    way = {"route": "hard" if bool(routing.hard[0]) else "easy"}
    return way if routing.difficulty is None else way | {"difficulty": float(routing.difficulty[0].sigmoid())}


if __name__ == "__main__":
    run(predict, "predict")
