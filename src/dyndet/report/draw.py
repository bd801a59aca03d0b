"""Boxes on images, with nothing but PIL."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from torch import Tensor

from dyndet.report.style import MIN_SIDE, Color, class_color, enlarged, enlargement, font, text_color, to_picture
from dyndet.structures import Detections, Size, Target

Box = tuple[float, float, float, float]


def draw_detections(
    image: Tensor,
    found: Detections | Target,
    names: Sequence[str],
    *,
    score_threshold: float = 0.3,
    boxes_size: Size | None = None,
    min_side: int = MIN_SIDE,
    line: int = 2,
) -> Image.Image:
    """Detections with their scores, or ground truth with crowds dashed, each class in its colour; masks as a tint.

    Args:
        image: (3, H, W), uint8 or float in 0..1; enlarged by a whole factor when smaller than `min_side`.
        found: what to draw.
        names: of the classes.
        score_threshold: detections below it are left out.
        boxes_size: H, W of the image that the boxes (and masks) belong to; None when it is `image`.
        min_side: see `image`.
        line: thickness of a box in pixels of the picture.
    """
    picture = to_picture(image)
    factor = enlargement(picture, min_side)
    picture = enlarged(picture, factor)
    height, width = boxes_size or (image.shape[-2], image.shape[-1])
    scale = torch.tensor([picture.width / width, picture.height / height] * 2)
    boxes = (found.boxes.detach().cpu().float() * scale).tolist()
    labels: list[int] = found.labels.tolist()
    scores = found.scores.tolist() if isinstance(found, Detections) else [None] * len(labels)
    crowds = found.crowd.tolist() if isinstance(found, Target) else [False] * len(labels)
    shown = [index for index, score in enumerate(scores) if score is None or score >= score_threshold]
    if found.masks is not None:
        for index in reversed(shown):  # the best on top
            _tint(picture, found.masks[index], class_color(labels[index]))
    pen = ImageDraw.Draw(picture)
    for index in reversed(shown):
        _rectangle(pen, boxes[index], class_color(labels[index]), line, dashed=crowds[index])
    tags: list[Box] = []
    for index in shown:
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
    """Writes the label above the box, else inside, else below, wherever no earlier label is; a last resort overlaps."""
    letters = font(12)
    width, height = round(letters.getlength(text)) + 6, 16
    picture_width, picture_height = pen.im.size
    left = max(0, min(round(box[0]), picture_width - width))
    tops = [round(box[1]) - height, round(box[1]), round(box[3]), round(box[3]) - height]
    places = [(left, top, left + width, top + height) for top in tops if 0 <= top <= picture_height - height]
    free = [place for place in places if not any(_overlap(place, other) for other in taken)]
    place = (free or places or [(left, 0, left + width, height)])[0]
    taken.append(place)
    pen.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=color)
    pen.text((place[0] + 3, place[1] + height / 2), text, fill=text_color(color), font=letters, anchor="lm")


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
