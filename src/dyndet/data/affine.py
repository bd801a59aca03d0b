"""Random affine maps of images, boxes and masks, by one matrix.

A matrix is (3, 3) float64 and takes (x, y, 1) in pixels of the source to pixels of the result. Pixel edges are 0..W, so
the centre of pixel i lies at i + 0.5, for boxes and for pixels alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import cos, radians, sin, tan

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Generator, Tensor
from torchvision.ops import box_area

from dyndet.data.letterbox import FILL
from dyndet.data.transforms import uniform
from dyndet.errors import UserError
from dyndet.structures import Sample, Size, Target

Vector = NDArray[np.floating]

MIN_SIDE, MAX_ASPECT = 2, 20
MIN_AREA, MIN_AREA_MASKS = 0.1, 0.01
MARGIN = 2
"""Pixels by which a mask may leave its box."""


class RandomAffine:
    """Rotates, scales, shears and shifts; what is left of an object must be worth training on.

    The centre of the source lands within `translate` of the centre of the result. Of the objects, those are kept that
    are wider and higher than 2 pixels after clipping, less elongated than 20 : 1, and still have 10 % of their area
    (1 % when they carry masks: their boxes are tight then). Boxes are those of the warped corners, or with masks those
    of the warped mask, which stands in for the warped polygon of the published pipeline.

    Args:
        degrees: rotation in +-degrees.
        translate: shift in +-share of the result's sides.
        scale: s draws from 1 - s .. 1.1 + s, as published; (low, high) draws from there.
        shear: in +-degrees, of either axis.
        size: side of the square result in pixels; None keeps the size.
        fill: grey of what lies outside of the source, 0..255.

    Raises:
        UserError: if an argument is out of range.
    """

    def __init__(
        self,
        *,
        degrees: float = 0.0,
        translate: float = 0.2,
        scale: float | Sequence[float] = 0.9,
        shear: float = 0.0,
        size: int | None = None,
        fill: int = FILL,
    ) -> None:
        factors = (1 - scale, 1.1 + scale) if isinstance(scale, int | float) else tuple(scale)
        if len(factors) != 2 or not 0 < factors[0] <= factors[1]:
            raise UserError(f"scale is {scale}, but factors must be above 0: give s below 1, or (low, high)")
        small = size is not None and size < 1
        if min(degrees, translate) < 0 or not 0 <= shear < 90 or not 0 <= fill <= 255 or small:
            raise UserError(
                f"degrees ({degrees}) and translate ({translate}) must not be negative, shear ({shear}) lies in 0..90, "
                f"fill ({fill}) in 0..255, and size ({size}) is at least 1"
            )
        self.degrees = degrees
        self.translate = translate
        self.scale = (float(factors[0]), float(factors[1]))
        self.shear = shear
        self.size = size
        self.fill = fill

    def __call__(self, sample: Sample, generator: Generator) -> Sample:
        height, width = sample.image.shape[-2:]
        size = (height, width) if self.size is None else (self.size, self.size)
        matrix = self.draw((height, width), size, generator)
        return Sample(warp_image(sample.image, matrix, size, self.fill), warp_target(sample.target, matrix, size))

    def draw(self, source: Size, size: Size, generator: Generator) -> Tensor:
        """A random matrix from images of `source` (H, W) to images of `size`."""
        return affine_matrix(
            source,
            size,
            degrees=uniform(-self.degrees, self.degrees, generator),
            scale=uniform(*self.scale, generator),
            shear=(uniform(-self.shear, self.shear, generator), uniform(-self.shear, self.shear, generator)),
            centre=(
                uniform(0.5 - self.translate, 0.5 + self.translate, generator),
                uniform(0.5 - self.translate, 0.5 + self.translate, generator),
            ),
        )


def affine_matrix(
    source: Size,
    size: Size,
    *,
    degrees: float = 0.0,
    scale: float = 1.0,
    shear: tuple[float, float] = (0.0, 0.0),
    centre: tuple[float, float] = (0.5, 0.5),
) -> Tensor:
    """Rotation and scaling about the centre, then shear, then the centre goes where `centre` says.

    Args:
        source: (H, W) of the source.
        size: (H, W) of the result.
        degrees: clockwise as seen on the screen.
        scale: factor of both axes.
        shear: degrees along x and along y.
        centre: where the centre of the source lands, (x, y) as share of the result.
    """
    angle, (shear_x, shear_y) = radians(degrees), (tan(radians(value)) for value in shear)
    turn = torch.tensor([[cos(angle), -sin(angle)], [sin(angle), cos(angle)]], dtype=torch.float64) * scale
    linear = torch.tensor([[1, shear_x], [shear_y, 1]], dtype=torch.float64) @ turn
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[:2, :2] = linear
    middle = torch.tensor([source[1] / 2, source[0] / 2], dtype=torch.float64)
    matrix[:2, 2] = torch.tensor([centre[0] * size[1], centre[1] * size[0]], dtype=torch.float64) - linear @ middle
    return matrix


def shift(x: float, y: float) -> Tensor:
    """The matrix that only moves."""
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[:2, 2] = torch.tensor([x, y], dtype=torch.float64)
    return matrix


def warp_image(image: Tensor, matrix: Tensor, size: Size, fill: int = FILL) -> Tensor:
    """(3, H, W) uint8, bilinear, without antialiasing (as published); `fill` surrounds the source."""
    inverse = torch.linalg.inv(matrix)
    # Only the part that is seen is converted to floats, with a pixel around it to blend with.
    (seen,) = warp_boxes(torch.tensor([[0, 0, size[1], size[0]]]), inverse).tolist()
    left, top = (max(int(side) - 1, 0) for side in seen[:2])
    image = image[:, top : max(int(seen[3]) + 2, 0), left : max(int(seen[2]) + 2, 0)]
    height, width = image.shape[-2:]
    if not height or not width:
        return image.new_full((3, *size), fill)
    x, y = (torch.arange(side, dtype=torch.float64) + 0.5 for side in reversed(size))
    (a, b, c), (d, e, f), _ = (shift(-left, -top) @ inverse).tolist()
    # grid_sample's -1..1 spans the pixel edges 0..W.
    across = ((b * y + c) * (2 / width) - 1)[:, None] + a * (2 / width) * x
    down = ((e * y + f) * (2 / height) - 1)[:, None] + d * (2 / height) * x
    grid = torch.stack([across, down], -1).float()
    # Pixels relative to the fill, because grid_sample surrounds an image with zeros.
    pixels = image.float().sub_(fill)
    return F.grid_sample(pixels[None], grid[None], align_corners=False)[0].add_(fill + 0.5).to(torch.uint8)


def warp_boxes(boxes: Tensor, matrix: Tensor) -> Tensor:
    """(N, 4) xyxy around the warped corners of the boxes, float64."""
    corners = boxes.double()[:, [[0, 1], [2, 1], [2, 3], [0, 3]]]
    moved = corners @ matrix[:2, :2].T + matrix[:2, 2]
    return torch.cat([moved.amin(1), moved.amax(1)], 1)


def warp_target(target: Target, matrix: Tensor, size: Size) -> Target:
    """Objects as they appear in the result, clipped; without those of which too little is left (see `RandomAffine`)."""
    limits = torch.tensor([size[1], size[0]] * 2, dtype=torch.float64)
    if target.masks is None:
        masks, boxes, min_area = None, warp_boxes(target.boxes, matrix), MIN_AREA
    else:
        masks, boxes = _warp_masks(target.masks, target.boxes, matrix, size)
        min_area = MIN_AREA_MASKS
    boxes = boxes.clamp(min=torch.zeros_like(limits), max=limits)
    before = box_area(target.boxes.double()) * torch.linalg.det(matrix[:2, :2]).abs()
    keep = _worth_keeping(boxes, before, min_area)
    # Annotated areas are those of the whole object on disk.
    return replace(target, boxes=boxes.to(target.boxes.dtype), masks=masks, area=None)[keep]


def _worth_keeping(boxes: Tensor, before: Tensor, min_area: float) -> Tensor:
    """(N,) bool by the clipped boxes and the areas they had before clipping."""
    sides = boxes[:, 2:] - boxes[:, :2]
    aspects = sides.amax(1) / sides.amin(1)
    return (sides > MIN_SIDE).all(1) & (aspects < MAX_ASPECT) & (box_area(boxes) > min_area * before)


def _warp_masks(masks: Tensor, boxes: Tensor, matrix: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """(N, H, W) masks, each pixel from the one that its centre falls in, and their tight boxes (N, 4) float64.

    Only the surroundings of an object's box are looked at: masks are mostly empty.
    """
    source = masks.numpy()
    result = np.zeros((len(source), *size), np.bool_)
    tight = np.zeros((len(source), 4))
    inverse = torch.linalg.inv(matrix).numpy()
    margin = torch.tensor([-MARGIN, -MARGIN, MARGIN, MARGIN])
    around = warp_boxes(boxes + margin, matrix).numpy()
    first = np.floor(around[:, :2]).astype(int).clip(0)
    last = np.ceil(around[:, 2:]).astype(int).clip(max=(size[1], size[0]))
    for index, ((left, top), (right, bottom)) in enumerate(zip(first, last, strict=True)):
        if left < right and top < bottom:
            window = _sampled(source[index], inverse, np.arange(left, right) + 0.5, np.arange(top, bottom) + 0.5)
            result[index, top:bottom, left:right] = window
            tight[index] = tight_box(window) + np.array([left, top, left, top])
    return torch.from_numpy(result), torch.from_numpy(tight)


def _sampled(mask: NDArray[np.bool_], inverse: NDArray[np.float64], x: Vector, y: Vector) -> NDArray[np.bool_]:
    """(H, W) of the mask under the points (x, y); False outside."""
    (a, b, c), (d, e, f), _ = inverse
    columns = np.floor(a * x + (b * y + c)[:, None]).astype(int)
    rows = np.floor(d * x + (e * y + f)[:, None]).astype(int)
    height, width = mask.shape
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    return mask[rows.clip(0, height - 1), columns.clip(0, width - 1)] & inside


def tight_box(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(4,) xyxy around the True pixels of an (H, W) mask; zeros when there are none."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(rows):
        return np.zeros(4, np.int64)
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
