"""Sections of a page with pictures: worst errors, easiest and hardest images, where gates opened."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from PIL import Image

from dyndet.metrics.error_split import Mistake
from dyndet.ops.flops import GIGA
from dyndet.report.findings import Findings
from dyndet.report.page import Html, cards, element, figure, html, paragraph, picture, section, small
from dyndet.report.pictures import ANNOTATED, MISSED, RIGHT, WRONG, boxes_of, close_up, outlined, read_picture

TRIES = 200
"""So many files that are gone end the search."""
WIDEST = 1900
"""Of the strip of gates, in pixels."""


class Gallery:
    """Pictures of a validation.

    Args:
        found: of the validation.
        folder: where image files lie by their names, when they are not where they were.
        count: of pictures in a row.
    """

    def __init__(self, found: Findings, folder: str | Path | None = None, *, count: int = 10) -> None:
        self.found = found
        self.folder = folder
        self.count = count
        self.gone = 0

    def errors(self, anchor: str) -> Html:
        """False detections with high scores, and the largest objects that were missed."""
        mistakes = self.found.counted_mistakes
        false = [item for item in mistakes if item.kind != "missed"]
        missed = sorted((item for item in mistakes if item.kind == "missed"), key=self._share, reverse=True)
        note = html(["At IoU 0.5 and the best thresholds. ", _key(detection=WRONG, missed=MISSED, annotated=ANNOTATED)])
        parts = [
            element("h3", "False detections with the highest scores"),
            self._mistakes(false),
            element("h3", "The largest missed objects"),
            self._mistakes(missed),
        ]
        return section("Worst errors", *parts, anchor=anchor, note=note)

    def extremes(self, anchor: str) -> Html:
        """The images with most and fewest errors, and those that took most and least compute."""
        scores, detections = self.found.scores, self.found.detections
        everything = range(len(scores))
        worst = sorted(everything, key=lambda image: (scores[image].f1, -scores[image].errors))
        best = sorted(everything, key=lambda image: (-scores[image].f1, -len(scores[image].hits)))
        parts = [
            element("h3", "Hardest: lowest F1, then most errors"),
            self._images(worst),
            element("h3", "Easiest: highest F1, then most objects"),
            self._images(best),
        ]
        spent = {image: float(item.macs) for image, item in enumerate(detections) if item.macs is not None}
        if len(set(spent.values())) > 1:
            dear = sorted(spent, key=lambda image: -spent[image])
            parts += [element("h3", "Most compute"), self._images(dear)]
            parts += [element("h3", "Least compute"), self._images(dear[::-1])]
        note = html(["Detections at the best thresholds. ", _key(right=RIGHT, wrong=WRONG, missed=MISSED)])
        return section("Easiest and hardest images", *parts, anchor=anchor, note=note)

    def _mistakes(self, mistakes: Iterable[Mistake]) -> Html:
        return self._row(((item.image, partial(self._mistake, item)) for item in mistakes), self.count)

    def _images(self, order: Iterable[int]) -> Html:
        return self._row(((index, partial(self._image, index)) for index in order), self.count // 2)

    def _row(self, items: Iterable[tuple[int, Callable[[Image.Image], Html]]], count: int) -> Html:
        """The first images that are there, each drawn in its way."""
        shown: list[Html] = []
        for index, draw in items:
            if len(shown) >= count or self.gone > TRIES:
                break
            image = read_picture(self.found.targets[index], self.folder)
            self.gone += image is None
            shown += [] if image is None else [draw(image)]
        if shown:
            return cards(*shown, small=True)
        if not self.gone:
            return paragraph("None.")
        return paragraph("The image files are not where they were: report again with images=FOLDER.", kind="problem")

    def _mistake(self, item: Mistake, image: Image.Image) -> Html:
        target, names = self.found.targets[item.image], self.found.names
        real = [index for index in range(len(target.labels)) if index != item.object]
        outlines = boxes_of(target, real, ANNOTATED)
        if item.kind == "missed":
            box = target.boxes[item.object].tolist()
            outlines.append((box, MISSED))
            caption = [f"{names[item.label]}, {_area(box)}", small(f"missed · image {target.image_id}")]
        else:
            box = self.found.detections[item.image].boxes[item.detection].tolist()
            outlines += [*boxes_of(target, [item.object] if item.object >= 0 else [], ANNOTATED), (box, WRONG)]
            really = f", is {names[int(target.labels[item.object])]}" if item.kind in ("classification", "both") else ""
            caption = [f"{names[item.label]} {item.score:.2f}", small(f"{item.kind}{really} · image {target.image_id}")]
        shown = picture(close_up(image, target, box, outlines), f"image {target.image_id}")
        return figure(element("a", shown, title=target.path), caption)

    def _image(self, index: int, image: Image.Image) -> Html:
        target, detections, score = self.found.targets[index], self.found.detections[index], self.found.scores[index]
        boxes = detections.boxes.tolist()
        outlines = boxes_of(target, score.lost, MISSED)
        outlines += [(boxes[row], RIGHT) for row in score.hits] + [(boxes[row], WRONG) for row in score.faults]
        counts = f"{len(score.hits)} right, {len(score.faults)} wrong, {len(score.lost)} missed"
        macs = "" if detections.macs is None else f" · {detections.macs / GIGA:.3f} GMAC"
        hard = self.found.validation.hard
        route = (" · hard route" if hard[index] else " · easy route") if hard else ""
        caption = [f"F1 {score.f1:.2f}{macs}", small(f"{counts} · image {target.image_id}{route}")]
        shown = picture(outlined(image, target, outlines), f"image {target.image_id}")
        return figure(element("a", shown, title=target.path), caption)

    def _share(self, item: Mistake) -> float:
        """Share of the image that the object covers."""
        target = self.found.targets[item.image]
        left, top, right, bottom = target.boxes[item.object].tolist()
        height, width = target.original_size
        return (right - left) * (bottom - top) / (height * width)


def preview_section(home: Path, anchor: str) -> Html | None:
    """The newest picture of the run's own previews: ground truth, detections, compute and gates."""
    pictures = sorted((home / "previews").glob("step_*.png"))
    if not pictures:
        return None
    try:
        with Image.open(pictures[-1]) as image:
            image.load()
            strip = image.convert("RGB")
    except OSError:
        return None
    if strip.width > WIDEST:
        strip = strip.resize((WIDEST, round(strip.height * WIDEST / strip.width)), Image.Resampling.LANCZOS)
    body = element("div", picture(strip, "previews", quality=75), class_="strip", tabindex="0")
    note = f"The first validation images at step {pictures[-1].stem.removeprefix('step_').lstrip('0') or '0'}."
    return section("Where gates opened", figure(body, span="wide"), anchor=anchor, note=note)


def _key(**colors: tuple[int, int, int]) -> Html:
    swatches = (
        element("span", element("i", style=f"background:rgb{color};outline:1px solid #333"), name)
        for name, color in colors.items()
    )
    return element("span", *swatches, class_="legend")


def _area(box: list[float]) -> str:
    return f"{round(box[2] - box[0])} x {round(box[3] - box[1])} px"
