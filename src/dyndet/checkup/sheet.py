"""The doctor's page: what was found, with pictures of it, and what training is shown."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from dyndet.checkup.finding import SEVERITIES, Finding, Place
from dyndet.checkup.split import Split
from dyndet.data.datamodule import DetectionDataModule
from dyndet.errors import DataError
from dyndet.report.draw import draw_detections
from dyndet.report.page import (
    Html,
    cards,
    details,
    document,
    element,
    facts,
    figure,
    matrix,
    paragraph,
    picture,
    section,
    table,
)
from dyndet.report.style import to_picture
from dyndet.structures import Sample, Target

TRAINING_IMAGES = 12
"""As many as training sees them, augmented."""
_SIDE = 300  # pixels of a picture on the page
_MARK = (255, 0, 160)
_BINS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def doctor_sheet(path: Path, splits: Sequence[Split], findings: Sequence[Finding], data: DetectionDataModule) -> Path:
    """Writes the page.

    Args:
        path: of the file.
        splits: that were examined.
        findings: in the order in which they are shown.
        data: where training images come from.
    """
    by_name = {split.name: split for split in splits}
    counts = {f"{severity}s": sum(item.severity == severity for item in findings) for severity in SEVERITIES}
    sections = [
        section(
            "What is there", facts(_facts(splits) | counts), cards(_classes(splits), _sides(splits)), anchor="there"
        ),
        section("What was found", *(_found(item, by_name) for item in findings), anchor="found")
        if findings
        else section("What was found", paragraph("Nothing that speaks against training on it."), anchor="found"),
        section(
            "What training is shown",
            cards(*_training(data)),
            anchor="training",
            note="Images of the first batches with their boxes, after everything that training does to them.",
        ),
    ]
    links = {"What is there": "there", "What was found": "found", "What training is shown": "training"}
    path.write_text(document("Data set, examined", *sections, links=links), encoding="utf-8")
    return path


def _facts(splits: Sequence[Split]) -> dict[str, str | int]:
    shown: dict[str, str | int] = {}
    for split in splits:
        shown |= {f"{split.name} images": len(split), f"{split.name} boxes": int((~split.crowd).sum())}
    return shown | {"classes": len(splits[0].categories)}


def _tables(splits: Sequence[Split]) -> tuple[Html, Html]:
    return _classes(splits), _sides(splits)


def _classes(splits: Sequence[Split]) -> Html:
    counts = {split.name: np.bincount(split.labels[~split.crowd], minlength=len(split.categories)) for split in splits}
    rows = [
        {
            "class": category.name,
            "id": category.id,
            **{f"boxes in {name}": int(count[label]) for name, count in counts.items()},
        }
        for label, category in enumerate(splits[0].categories)
    ]
    shown = table(rows)
    return figure(shown, "Boxes per class") if len(rows) <= 12 else details(f"Boxes of {len(rows)} classes", shown)


def _sides(splits: Sequence[Split]) -> Html:
    """How many boxes are how large, by the square root of their area on disk."""
    names = [
        "up to 2",
        *(f"{low} to {high}" for low, high in pairwise(_BINS)),
        f"above {_BINS[-1]}",
    ]
    shares = {}
    for split in splits:
        boxes = split.boxes[~split.crowd]
        sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).clip(0).prod(1))
        shares[split.name] = np.bincount(np.searchsorted(_BINS, sides), minlength=len(names)) / max(1, len(sides))
    filled = [place for place in range(len(names)) if any(share[place] for share in shares.values())]
    values = [[float(share[place]) for share in shares.values()] for place in filled]
    cells = [[f"{value:.1%}" for value in row] for row in values]
    shown = matrix([names[place] for place in filled], list(shares), cells, values, corner="pixels")
    return figure(shown, "Sizes of boxes on disk: square root of their area")


def _found(finding: Finding, splits: dict[str, Split]) -> Html:
    pictures = [shown for place in finding.places if (shown := _picture(place, splits)) is not None]
    named = element("ul", *(element("li", place.where) for place in finding.places)) if finding.places else None
    return section(
        f"{finding.severity}: {finding.check}",
        paragraph(finding.advice) if finding.advice else None,
        cards(*pictures) if pictures else None,
        named,
        note=finding.text,
        level=3,
    )


def _picture(place: Place, splits: dict[str, Split]) -> Html | None:
    """The image of a place with its labels; what is meant is marked."""
    split = splits.get(place.split)
    if split is None or place.index is None:
        return None
    try:
        sample = split.dataset[place.index]
    except DataError:
        return None
    drawn = _drawn(sample, [category.name for category in split.categories])
    height, width = sample.image.shape[-2:]
    pen = ImageDraw.Draw(drawn)
    for x1, y1, x2, y2 in place.boxes:
        scale = drawn.width / width, drawn.height / height
        pen.rectangle(
            (x1 * scale[0] - 4, y1 * scale[1] - 4, x2 * scale[0] + 4, y2 * scale[1] + 4), outline=_MARK, width=3
        )
    return figure(picture(drawn, place.where), Path(place.where.partition(": ")[0]).name)


def _training(data: DetectionDataModule) -> list[Html]:
    names = [category.name for category in data.categories]
    shown: list[Html] = []
    try:
        for sample in data.training_samples(TRAINING_IMAGES):
            caption = f"{len(sample.target.boxes)} boxes"
            shown.append(figure(picture(_drawn(sample, names), caption), caption))
    except DataError as error:
        shown.append(paragraph(str(error)))
    return shown


def _drawn(sample: Sample, names: Sequence[str]) -> Image.Image:
    """At most `_SIDE` pixels wide and high, boxes drawn afterwards so that they stay thin."""
    image = to_picture(sample.image)
    height, width = sample.image.shape[-2:]
    image.thumbnail((_SIDE, _SIDE))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    boxes = Target(sample.target.boxes, sample.target.labels, sample.target.crowd)
    return draw_detections(pixels, boxes, names, boxes_size=(height, width), min_side=1)
