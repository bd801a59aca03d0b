"""A folder in which the commands of the pages run as they stand: `RUN`, `photos`, `my_data` are what they say."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch
from blocks import Block, call_of, lines_of
from PIL import Image
from released_layouts import RELEASES, random_weights

from commands import ENVIRONMENT, forked
from dyndet.data.shapes import ShapesDataset

TINY = [
    "data.size=64", "data.train_images=16", "data.val_images=8", "data.batch_size=8", "trainer.max_epochs=1",
    "neck.channels=16", "~callbacks.progress",
]  # fmt: skip
HEAD = ["head.depth=1", "head.norm_groups=4"]


class Sandbox:
    """The folder; what a block names is made when the first block names it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: set[str] = set()

    def run(self, block: Block) -> None:
        """Runs the commands or the code of a block.

        Raises:
            AssertionError: with the output of what fails.
        """
        self.prepare(block.text)
        if block.language == "python":
            self._python(block)
            return
        for words in lines_of(block):
            called = call_of(words)
            if called is not None:
                name, arguments = called
                self.command(name, *arguments, *block.added(name))

    def command(self, name: str, *arguments: str) -> str:
        result = forked(self.folder, name, *arguments)
        line = shlex.join([f"dyndet {name}", *arguments])
        assert result.returncode == 0, f"{line}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
        return result.stdout

    def prepare(self, text: str) -> None:
        for name, make in MAKERS.items():
            if name not in self._made and re.search(rf"\b{re.escape(name)}\b", text):
                self._made.add(name)
                make(self)

    def _python(self, block: Block) -> None:
        def run() -> None:
            log = (self.folder / "stderr").open("w")
            os.dup2(log.fileno(), 2)
            os.chdir(self.folder)
            os.environ.update(ENVIRONMENT)
            torch.manual_seed(0)
            exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})

        process = get_context("fork").Process(target=run)
        process.start()
        process.join(timeout=240)
        process.kill()
        process.join()
        assert process.exitcode == 0, f"{block}\n{(self.folder / 'stderr').read_text()[-2000:]}"


def _run(sandbox: Sandbox) -> None:
    """A fine-grained detector of generated shapes."""
    sandbox.command("train", "hydra.run.dir=RUN", *TINY, *HEAD)


def _photos(sandbox: Sandbox) -> None:
    (sandbox.folder / "photos").mkdir()
    for index in range(2):
        _picture(ShapesDataset(length=2, size=96, seed=5), index).save(sandbox.folder / "photos" / f"{index}.jpg")


def _my_data(sandbox: Sandbox) -> None:
    """A COCO export: a folder per split with its images and `_annotations.coco.json`."""
    for split, length, seed in (("train", 16, 6), ("valid", 8, 7)):
        folder = sandbox.folder / "my_data" / split
        folder.mkdir(parents=True)
        shapes = ShapesDataset(length=length, size=96, num_classes=4, seed=seed)
        images, annotations = [], []
        for index in range(length):
            name = f"{split}_{index:03d}.jpg"
            _picture(shapes, index).save(folder / name)
            images.append({"id": index, "file_name": name, "height": 96, "width": 96})
            target = shapes[index].target
            for (left, top, right, bottom), label in zip(target.boxes.tolist(), target.labels.tolist(), strict=True):
                box = {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)}
                ids = {"id": len(annotations), "image_id": index, "category_id": label + 1, "iscrowd": 0}
                annotations.append(ids | box)
        categories = [{"id": label + 1, "name": shapes.categories[label].name} for label in range(4)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "_annotations.coco.json").write_text(json.dumps(content))


def _released(sandbox: Sandbox) -> None:
    """A file in the layout of mmdetection's ATSS, with random weights."""
    release = RELEASES["mmdet atss_r50"]
    torch.save({"state_dict": random_weights(release.shapes), "meta": release.meta}, sandbox.folder / "released.pth")


def _picture(shapes: ShapesDataset, index: int) -> Image.Image:
    return Image.fromarray(shapes[index].image.permute(1, 2, 0).numpy())


MAKERS: dict[str, Callable[[Sandbox], None]] = {
    "RUN": _run, "photos": _photos, "my_data": _my_data,
    "released.pth": _released,
}  # fmt: skip
