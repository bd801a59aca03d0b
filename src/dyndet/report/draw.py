"""Boxes on images, with nothing but PIL."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from torch import Tensor
from torchvision.ops import nms

from dyndet.report.style import (
    MIN_SIDE,
    Color,
    class_color,
    enlarged,
    enlargement,
    fitted,
    text_color,
    to_picture,
)
from dyndet.structures import Detections, Size, Target

Box = tuple[float, float, float, float]

SAME_OBJECT = 0.4
"""Boxes of any class that overlap a better one by more (IoU) are taken for the same object, in pictures only."""

DRAWN_FROM = 0.4
"""Scores below it are left out of pictures where nothing else is asked: near the best F1 of the small recipes."""


def visible(found: Detections, score_threshold: float) -> Detections:
    """What pictures show of detections: one box per object, the best, of at least this score."""
    found = found.to("cpu")[found.scores.cpu() >= score_threshold]
    return found[nms(found.boxes.float(), found.scores.float(), SAME_OBJECT)]


def draw_detections(
    image: Tensor,
    found: Detections | Target,
    names: Sequence[str],
    *,
    score_threshold: float = DRAWN_FROM,
    boxes_size: Size | None = None,
    min_side: int = MIN_SIDE,
    line: int | None = None,
) -> Image.Image:
    """Detections with their scores, one box per object, or all of ground truth with crowds dashed; masks as a tint.

    Every class has its colour. Which detections are shown says `visible`; files hold them all.

    Args:
        image: (3, H, W), uint8 or float in 0..1; enlarged by a whole factor when smaller than `min_side`.
        found: what to draw.
        names: of the classes.
        score_threshold: detections below it are left out.
        boxes_size: H, W of the image that the boxes (and masks) belong to; None when it is `image`.
        min_side: see `image`.
        line: thickness of a box in pixels of the picture; None goes by its size.
    """
    if isinstance(found, Detections):
        found = visible(found, score_threshold)
    picture = to_picture(image)
    factor = enlargement(picture, min_side)
    picture = enlarged(picture, factor)
    line = line or max(2, round(max(picture.size) / 500))
    height, width = boxes_size or (image.shape[-2], image.shape[-1])
    scale = torch.tensor([picture.width / width, picture.height / height] * 2)
    boxes = (found.boxes.detach().cpu().float() * scale).tolist()
    labels: list[int] = found.labels.tolist()
    scores = found.scores.tolist() if isinstance(found, Detections) else [None] * len(labels)
    crowds = found.crowd.tolist() if isinstance(found, Target) else [False] * len(labels)
    if found.masks is not None:
        for index in reversed(range(len(labels))):  # the best on top
            _tint(picture, found.masks[index], class_color(labels[index]))
    pen = ImageDraw.Draw(picture)
    for index in reversed(range(len(labels))):
        _rectangle(pen, boxes[index], class_color(labels[index]), line, dashed=crowds[index])
    tags: list[Box] = []
    for index in range(len(labels)):
        name = names[labels[index]] if labels[index] < len(names) else str(labels[index])
        detail = "" if scores[index] is None else f" {scores[index]:.2f}"
        _tag(pen, boxes[index], name + detail + (" (crowd)" if crowds[index] else ""), class_color(labels[index]), tags)
    return picture


def contact_sheet(
    pictures: Sequence[Image.Image], *, columns: int | None = None, gap: int = 8, background: Color = (255, 255, 255)
) -> Image.Image:
    """Pictures in rows of `columns` (default: about as many as rows), each at the top left of its cell.

    Raises:
        ValueError: if there are no pictures.
    """
    if not pictures:
        raise ValueError("a contact sheet needs at least one picture")
    columns = min(columns or max(1, round(len(pictures) ** 0.5)), len(pictures))
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    widths = [max(row[column].width for row in rows if column < len(row)) for column in range(columns)]
    heights = [max(picture.height for picture in row) for row in rows]
    sheet = Image.new("RGB", (sum(widths) + gap * (columns + 1), sum(heights) + gap * (len(rows) + 1)), background)
    top = gap
    for row, height in zip(rows, heights, strict=True):
        left = gap
        for picture, width in zip(row, widths, strict=False):
            sheet.paste(picture, (left, top))
            left += width + gap
        top += height + gap
    return sheet


def _tint(picture: Image.Image, mask: Tensor, color: Color, strength: int = 110) -> None:
    """Mixes a colour into the mask's pixels, which stay visible, and draws the outline in it."""
    alpha = Image.fromarray(mask.detach().cpu().to(torch.uint8).numpy() * strength)
    alpha = alpha.resize(picture.size, Image.Resampling.NEAREST)
    place = alpha.getbbox()
    if place is None:
        return
    left, top, right, bottom = place
    alpha = alpha.crop((left - 1, top - 1, right + 1, bottom + 1))  # with a border, beyond the picture if need be
    outline = ImageChops.subtract(alpha, alpha.filter(ImageFilter.MinFilter(3))).point([0, *[255] * 255])
    picture.paste(color, (left - 1, top - 1), ImageChops.lighter(alpha, outline))


def _rectangle(pen: ImageDraw.ImageDraw, box: Box, color: Color, line: int, *, dashed: bool) -> None:
    # Pixel edges to pixel centres; PIL wants the right and bottom edge no smaller than the left and top one.
    left, top = round(box[0]), round(box[1])
    right, bottom = max(left, round(box[2]) - 1), max(top, round(box[3]) - 1)
    if not dashed:
        pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=text_color(color))  # seen on any ground
        pen.rectangle((left, top, right, bottom), outline=color, width=line)
        return
    dash = 6
    for start in range(left, right + 1, 2 * dash):
        stop = min(start + dash - 1, right)
        pen.rectangle((start, top, stop, top + line - 1), fill=color)
        pen.rectangle((start, bottom - line + 1, stop, bottom), fill=color)
    for start in range(top, bottom + 1, 2 * dash):
        stop = min(start + dash - 1, bottom)
        pen.rectangle((left, start, left + line - 1, stop), fill=color)
        pen.rectangle((right - line + 1, start, right, stop), fill=color)


def _tag(pen: ImageDraw.ImageDraw, box: Box, text: str, color: Color, taken: list[Box]) -> None:
    """Writes the label at the box, best above it, wherever no earlier label is; a last resort overlaps."""
    picture_width, picture_height = pen.im.size
    size = max(12, round(max(pen.im.size) / 56))
    letters = fitted(text, picture_width - 6, size)
    width, height = round(letters.getlength(text)) + size // 2, size + 4
    left, top, right, bottom = map(round, box)
    inside = [max(0, min(x, picture_width - width)) for x in (left, right - width)]
    rows = [top - height, top, bottom, bottom - height, *range(top + height, bottom - 2 * height, height)]
    corners = [(x, y) for x in inside for y in rows]
    corners += [(x, top + step * height) for step in range(-3, 4) for x in (right + 1, left - width - 1, *inside)]
    near = sorted((other for other in taken if abs(other[1] - top) < 8 * height), key=lambda other: abs(other[1] - top))
    corners += [(x, y) for other in near for y in (other[3], other[1] - height) for x in inside]  # flush with another
    limits = (picture_width - width, picture_height - height)
    places = [(x, y, x + width, y + height) for x, y in corners if 0 <= x <= limits[0] and 0 <= y <= limits[1]]
    free = (place for place in places if not any(_overlap(place, other) for other in taken))
    place = next(free, None) or (*places, (inside[0], 0, inside[0] + width, height))[0]
    taken.append(place)
    pen.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=color)
    middle = (place[0] + size // 4, place[1] + height / 2)
    pen.text(middle, text, fill=text_color(color), font=letters, anchor="lm")


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
