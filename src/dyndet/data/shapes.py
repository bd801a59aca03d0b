"""A generated detection set: coloured shapes, a known share of hard images, no files.

An image is a function of (seed, index). Its difficulty d in [0, 1] is drawn first and decides everything else: how many
objects, how small, how much they may cover each other, and how cluttered and noisy the picture is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from dyndet.errors import UserError
from dyndet.structures import Category, Sample, Size, Target

Array = NDArray[np.floating]
Mask = NDArray[np.bool_]


def _triangle(u: Array, v: Array) -> Mask:
    return (v <= 0.8) & (np.abs(u) <= 0.53 * (v + 1))


def _star(u: Array, v: Array) -> Mask:
    # Fold the plane into one of ten equal sectors; there the star is the half-plane left of the edge tip -> notch.
    sector = math.pi / 5
    angle = np.abs((np.arctan2(u, -v) + sector) % (2 * sector) - sector)
    radius = np.hypot(u, v)
    notch_x, notch_y = 0.45 * math.cos(sector), 0.45 * math.sin(sector)
    return (radius * np.cos(angle) - 1) * notch_y <= radius * np.sin(angle) * (notch_x - 1)


def _cross(u: Array, v: Array) -> Mask:
    a, b = np.abs(u), np.abs(v)
    return (np.minimum(a, b) <= 0.32) & (np.maximum(a, b) <= 0.95)


def _ring(u: Array, v: Array) -> Mask:
    radius = u * u + v * v
    return (radius <= 1) & (radius >= 0.3)


def _heart(u: Array, v: Array) -> Mask:
    x, y = 1.15 * u, 0.12 - 1.15 * v
    return (x * x + y * y - 1) ** 3 <= x * x * y**3


KINDS: dict[str, Callable[[Array, Array], Mask]] = {
    "circle": lambda u, v: u * u + v * v <= 1,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) <= 0.9,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "diamond": lambda u, v: np.abs(u) / 0.65 + np.abs(v) <= 1,
    "hexagon": lambda u, v: np.maximum(np.abs(u), np.abs(u) / 2 + 0.866 * np.abs(v)) <= 0.87,
    "crescent": lambda u, v: (u * u + v * v <= 1) & ((u - 0.5) ** 2 + v * v > 0.55),
    "heart": _heart,
}
"""Inside of each shape as a predicate on the unit square: u to the right, v down."""

TRIES = 6
MAX_COVERED = 0.6


class ShapesDataset:
    """Coloured shapes on plain (easy) or cluttered (hard) backgrounds; class k is the k-th of `KINDS`.

    Boxes are the tight boxes of what is visible, so boxes and masks agree. At 128 px their sides span about 10..90 px;
    they grow with the shorter side of the image.

    Args:
        length: number of images.
        size: (H, W) of every image, or one number for a square.
        num_classes: distinct shapes, at most `len(KINDS)`.
        seed: another seed is another set (validation, for example).
        hard_fraction: share of images with difficulty in [0.5, 1); the others lie in [0, 0.5).
        load_masks: whether targets carry (N, H, W) masks.

    Raises:
        UserError: if an argument is out of range.
    """

    def __init__(
        self,
        *,
        length: int = 512,
        size: Size | int = (128, 128),
        num_classes: int = 3,
        seed: int = 0,
        hard_fraction: float = 0.5,
        load_masks: bool = False,
    ) -> None:
        height, width = sides = (size, size) if isinstance(size, int) or len(size) != 2 else size
        if not all(isinstance(side, int) for side in sides):
            raise UserError(f"data.size={size} of generated shapes: give a number of pixels, or [height, width]")
        if not 1 <= num_classes <= len(KINDS):
            raise UserError(f"num_classes is {num_classes}, but there are {len(KINDS)} shapes: choose 1..{len(KINDS)}")
        if min(height, width) < 32:
            raise UserError(f"shapes need images of at least 32 x 32 pixels, not {height} x {width}")
        if not 0 <= hard_fraction <= 1:
            raise UserError(f"hard_fraction is {hard_fraction}, but a share lies in 0..1")
        if length < 0 or seed < 0:
            raise UserError(f"length ({length}) and seed ({seed}) of generated shapes must not be negative")
        self.length = length
        self.size: Size = (int(height), int(width))
        self.seed = seed
        self.hard_fraction = hard_fraction
        self.load_masks = load_masks
        self.kinds = list(KINDS)[:num_classes]
        self.categories = [Category(id, name) for id, name in enumerate(self.kinds, start=1)]
        self.sizes = [self.size] * length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(f"image {index} of {self.length}")
        rng = np.random.default_rng([self.seed, index])
        hard = rng.random() < self.hard_fraction
        difficulty = 0.5 * (rng.random() + hard)
        clutter = max(0.0, 2 * difficulty - 1)

        image, ground = _background(rng, self.size, clutter)
        owner = np.full(self.size, -1, np.int16)
        labels = self._draw_objects(rng, image, owner, ground, difficulty)
        if hard:
            image = _noisy(rng, image, 8 + 30 * clutter)

        visible = owner == np.arange(len(labels), dtype=np.int16)[:, None, None]
        target = Target(
            boxes=torch.from_numpy(_tight_boxes(visible)),
            labels=torch.tensor(labels, dtype=torch.int64),
            crowd=torch.zeros(len(labels), dtype=torch.bool),
            masks=torch.from_numpy(visible) if self.load_masks else None,
            image_id=index,
            original_size=self.size,
            difficulty=difficulty,
        )
        return Sample(torch.from_numpy(image).permute(2, 0, 1).contiguous(), target)

    def _draw_objects(
        self, rng: np.random.Generator, image: NDArray[np.uint8], owner: NDArray[np.int16], ground: Array, d: float
    ) -> list[int]:
        """Paints shapes into `image` and `owner` (which object is visible where); returns their labels."""
        height, width = self.size
        unit = min(self.size) / 128
        count = 1 + int(6 * d) if d < 0.5 else 4 + int(18 * (d - 0.5))
        smallest, largest = max(11.0, 36 - 40 * d) * unit, (80 - 46 * d) * unit
        labels: list[int] = []
        full: list[int] = []
        shown = np.zeros(0, np.int64)
        for _ in range(count):
            label = int(rng.integers(len(self.kinds)))
            mask = _shape(rng, self.kinds[label], rng.uniform(smallest, largest))
            rows, columns = mask.shape
            for _ in range(TRIES):
                top = int(rng.integers(height - rows + 1))
                left = int(rng.integers(width - columns + 1))
                window = (slice(top, top + rows), slice(left, left + columns))
                below = owner[window][mask]
                covered = np.bincount(below[below >= 0], minlength=len(labels))
                # Easy images keep their objects apart; nobody can be asked to find what is mostly hidden.
                if np.all(shown - covered >= (1 - MAX_COVERED * d) * np.asarray(full)):
                    break
            else:
                continue
            owner[window][mask] = len(labels)
            image[window][mask] = _colour(rng, ground, 200 - 80 * d)
            full.append(len(below))
            shown = np.append(shown - covered, len(below))
            labels.append(label)
        return labels


def _shape(rng: np.random.Generator, kind: str, side: float) -> Mask:
    """A slightly turned and stretched shape, cut to its tight box."""
    stretch = math.exp(rng.uniform(-0.2, 0.2))
    angle = rng.uniform(-0.35, 0.35)
    reach = math.ceil(0.8 * side)
    line = np.arange(-reach, reach + 1, dtype=np.float32) * (2 / side)
    x, y = line[None, :], line[:, None]
    cos, sin = math.cos(angle), math.sin(angle)
    mask = KINDS[kind](stretch * (x * cos + y * sin), (y * cos - x * sin) / stretch)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _colour(rng: np.random.Generator, ground: Array, contrast: float) -> NDArray[np.uint8]:
    """A random colour whose channels differ from the ground by `contrast` in sum, or the best of a few."""
    candidates = rng.integers(0, 256, (8, 3), dtype=np.uint8)
    distance = np.abs(candidates - ground).sum(1)
    return candidates[np.argmax(np.minimum(distance, contrast))]


def _background(rng: np.random.Generator, size: Size, clutter: float) -> tuple[NDArray[np.uint8], Array]:
    """(H, W, 3) soft blotches and, when cluttered, distractor lines; and its mean colour."""
    height, width = size
    ground = rng.uniform(50, 205, 3).astype(np.float32)
    knots = 5 if clutter else 2
    blotches = ground + (10 + 45 * clutter) * rng.uniform(-1, 1, (knots, knots, 3)).astype(np.float32)
    smooth = np.einsum("hi,ijc->hjc", _hats(height, knots), blotches)
    image = np.matmul(_hats(width, knots), smooth).clip(0, 255).astype(np.uint8)
    if clutter:
        lines = 3 + int(15 * clutter)
        start, end = rng.uniform(0, 1, (2, lines, 2, 1))
        path = (start + (end - start) * np.linspace(0, 1, max(size))) * np.array([[height - 2], [width - 2]])
        rows, columns = path.astype(np.intp).transpose(1, 0, 2)
        colours = rng.integers(0, 256, (lines, 1, 3), dtype=np.uint8)
        image[rows, columns] = colours
        image[rows + 1, columns] = colours
    return image, ground


def _hats(length: int, knots: int) -> Array:
    """(length, knots) weights of linear interpolation between evenly spaced knots."""
    position = np.linspace(0, knots - 1, length, dtype=np.float32)[:, None]
    return np.maximum(0, 1 - np.abs(position - np.arange(knots, dtype=np.float32)))


def _noisy(rng: np.random.Generator, image: NDArray[np.uint8], amplitude: float) -> NDArray[np.uint8]:
    """Adds grey noise, uniform in +-amplitude."""
    noise = rng.integers(0, 256, image.shape[:2], dtype=np.uint8).astype(np.int16) - 128
    noise = (noise * np.int16(amplitude)) >> 7
    return (image + noise[..., None]).clip(0, 255).astype(np.uint8)


def _tight_boxes(masks: Mask) -> Array:
    """(N, 4) xyxy of (N, H, W) masks, none of them empty."""
    sides: list[NDArray[np.intp]] = []
    for along in (np.asarray(masks.any(1)), np.asarray(masks.any(2))):
        sides += [along.argmax(1), along.shape[1] - along[:, ::-1].argmax(1)]
    x1, x2, y1, y2 = sides
    return np.stack([x1, y1, x2, y2], 1).astype(np.float32)
