"""Writes docs/tutorial_your_data.md from real runs: `python scripts/make_tutorial.py SET [--weights FILE]`.

SET is a COCO-style folder (annotations/train.json, annotations/val.json, images/). A stranger's folder is made of it:
other class names, the layout of a labelling site's YOLO export, no validation split, three faults. Then the commands of
the tutorial run in it one after the other; their output, shortened but not changed, and their times go on the page.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

NAMES = {"RBC": "red cell", "WBC": "white cell", "Platelets": "platelet"}
_LEFT_OUT = r"it/s|^ {40}|PU available|^Loading `|^`Trainer"
"""Lines of progress bars, and of Lightning about itself."""
_TORN, _TWICE, _COPIED = 5, 9, 14
"""Images of the folder with a fault each: half a file, a box drawn twice, a copy under another name."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the folder, runs the commands, writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument(
        "--weights", type=Path, help="ImageNet weights of the backbone, where they cannot be downloaded"
    )
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        stranger(options.source, work / "cells", work / "new photos")
        if options.weights:
            shutil.copy(options.weights, work / "lite0.pth")
        page = Tutorial(work, weights=options.weights is not None).write()
        (options.out / "tutorial_your_data.md").write_text(page)
        pictures(work, options.out)


def stranger(source: Path, folder: Path, photos: Path) -> None:
    """A YOLO export with one split and faults in it, and photos without labels: the set's validation images."""
    content = json.loads((source / "annotations" / "train.json").read_text())
    ids = {category["id"]: number for number, category in enumerate(content["categories"])}
    (folder / "train" / "images").mkdir(parents=True)
    (folder / "train" / "labels").mkdir()
    photos.mkdir()
    for number, image in enumerate(content["images"]):
        lines = []
        for item in (item for item in content["annotations"] if item["image_id"] == image["id"]):
            x, y, width, height = item["bbox"]
            centre = (x + width / 2) / image["width"], (y + height / 2) / image["height"]
            size = width / image["width"], height / image["height"]
            lines.append(" ".join([str(ids[item["category_id"]]), *(f"{value:.6f}" for value in (*centre, *size))]))
        if number == _TWICE:
            lines.append(lines[0])
        file = folder / "train" / "images" / f"cell {number:03d}.jpg"
        shutil.copy(source / "images" / image["file_name"], file)
        label = folder / "train" / "labels" / f"cell {number:03d}.txt"
        label.write_text("\n".join(lines) + "\n")
        if number == _COPIED:
            shutil.copy(file, file.with_name("copy.jpg"))
            shutil.copy(label, label.with_name("copy.txt"))
        if number == _TORN:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    names = [NAMES.get(category["name"], category["name"]) for category in content["categories"]]
    (folder / "data.yaml").write_text(f"train: ../train/images\nval:\nnc: {len(names)}\nnames: {names}\n")
    unseen = json.loads((source / "annotations" / "val.json").read_text())
    for image in unseen["images"][:6]:
        shutil.copy(source / "images" / image["file_name"], photos / image["file_name"])


class Tutorial:
    """Commands, what they print, and the words between.

    Args:
        folder: where they run.
        weights: whether `lite0.pth` lies there.
    """

    def __init__(self, folder: Path, *, weights: bool) -> None:
        self.folder = folder
        self.more = ["backbone.weights=lite0.pth"] if weights else []
        self.seconds = 0.0
        self.lines: list[str] = []

    def write(self) -> str:
        """Runs everything and returns the page."""
        self.say(_INTRODUCTION)
        self.run("doctor", "data=auto", "data.root=cells", code=1)
        self.say(_AFTER_DOCTOR.format(weights=_WEIGHTS if self.more else ""))
        torn, copied = (
            self.folder / "cells" / "train" / "images" / name for name in (f"cell {_TORN:03d}.jpg", "copy.jpg")
        )
        for file in (torn, copied):
            file.unlink()
            (self.folder / "cells" / "train" / "labels" / file.with_suffix(".txt").name).unlink()
        label = self.folder / "cells" / "train" / "labels" / f"cell {_TWICE:03d}.txt"
        label.write_text("\n".join(dict.fromkeys(label.read_text().splitlines())) + "\n")
        recipe = ("+experiment=finetune", "data=auto", "data.root=cells", "data.size=320", "head=fine_grained_small")
        self.run("train", *recipe, *self.more)
        self.say(_AFTER_TRAINING)
        run = sorted((self.folder / "outputs" / "finetune").iterdir())[-1].relative_to(self.folder)
        self.run("report", f"runs={run}")
        self.say(_AFTER_REPORT)
        self.run("predict", f"ckpt={run}/checkpoints/best.ckpt", "source=new photos")
        self.say(_END.format(minutes=self.seconds / 60))
        return "\n".join(self.lines) + "\n"

    def say(self, words: str) -> None:
        self.lines += [words.strip(), ""]

    def run(self, name: str, *arguments: str, code: int = 0) -> None:
        """Runs a command and keeps what it printed.

        Raises:
            RuntimeError: if it exits with another code.
        """
        typed = " ".join(f'"{item}"' if " " in item else item for item in arguments)
        environment = {**os.environ, "COLUMNS": "110", "WANDB_MODE": "offline", "NO_COLOR": "1", "TERM": "dumb"}
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "dyndet", name, *arguments],
            cwd=self.folder, env=environment, text=True, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        seconds = time.monotonic() - start
        self.seconds += seconds
        if done.returncode != code:
            raise RuntimeError(f"dyndet {name} ended with {done.returncode}: {done.stdout}")
        print(f"dyndet {name} {typed}: {seconds:.0f} s", file=sys.stderr)
        self.lines += ["```console", f"$ dyndet {name} {typed}", *shortened(done.stdout, self.folder), "```", ""]
        self.lines += [
            f"({seconds / 60:.1f} minutes on two cores.)" if seconds > 60 else f"({seconds:.0f} seconds.)",
            "",
        ]


def shortened(text: str, folder: Path) -> list[str]:
    """The lines of an output without progress bars and what Lightning says of itself; paths from `folder` on."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace(f"{folder}/", "")
    lines = [line.rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [line for line in lines if line.strip() and not re.search(_LEFT_OUT, line)]


def pictures(folder: Path, out: Path) -> None:
    """Copies what the page shows: the newest preview and the pictures of predict, small."""
    found = sorted(folder.glob("outputs/predict/*/pictures/*"))[:3]
    shown = [Image.open(file).convert("RGB") for file in found]
    for image in shown:
        image.thumbnail((420, 420))
    sheet = Image.new(
        "RGB", (sum(image.width for image in shown) + 8 * (len(shown) - 1), max(i.height for i in shown)), "white"
    )
    left = 0
    for image in shown:
        sheet.paste(image, (left, 0))
        left += image.width + 8
    sheet.save(out / "tutorial_predictions.jpg", quality=85)


_INTRODUCTION = """
# Your data: from a folder to a detector

<!-- written by scripts/make_tutorial.py from real runs: change that, not this page -->

The folder `cells` came from a labelling site: 292 microscope photos of blood cells as a YOLO export, with one split and
three kinds of cells. Everything below was typed in this order in the folder that holds it; every key is explained where
it is first used. Nothing else was done, and the times are those of two CPU cores. Of the output, progress bars and what
Lightning says of itself are left out, and paths start in that folder.

## 1. Is it good enough to learn from?

`data=auto` recognises how a folder is laid out, `data.root` names it.
"""

_AFTER_DOCTOR = """
Three faults: one photo is half a file, one lies there twice, one object was boxed twice. The command changed nothing
and ended with exit code 1. `doctor.html` has pictures of them, and of what training will be shown. We deleted the
broken photo and the copy with their label files, and the second line of the box that was drawn twice.

## 2. Train

`+experiment=finetune` is the recipe for own data. `data.size=320` has photos resized so that their shorter side is 320
pixels. `head=fine_grained_small` is a head that learns where to compute: it has gates for every place of a photo, and
training puts a price on those that are open.{weights}
"""

_WEIGHTS = """ The backbone starts from ImageNet weights; they are downloaded, unless
`backbone.weights` names a file that has them."""

_AFTER_TRAINING = """
There was no validation split, so a fifth of the photos was set apart, the same in every run; AP is measured on them.
Under `head` the last lines say what share of its compute the head used, in the mean over these photos.

## 3. What does it get right, and what wrong?

`runs` names the folder of the run, as the last line above says.
"""

_AFTER_REPORT = """
`report.html` is one file without scripts: curves, AP per class, precision and recall with the best threshold per class,
confusion matrix, kinds of errors, and the worst of them as pictures.

## 4. Use it

`ckpt` names the trained detector: `best.ckpt` is the best of all validations. `source` names photos, here a folder.
"""

_END = """
![three of the photos with what was found](tutorial_predictions.jpg)

All four commands together took {minutes:.1f} minutes.
"""


if __name__ == "__main__":
    main()
