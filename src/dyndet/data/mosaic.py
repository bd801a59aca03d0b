"""Mosaics: four or nine images side by side, of which a random affine map shows a part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from dyndet.data.affine import RandomAffine, shift, warp_image, warp_target
from dyndet.data.letterbox import FILL, Letterbox, resize_longest
from dyndet.data.sampler import Indexable
from dyndet.data.transforms import chance
from dyndet.errors import UserError
from dyndet.structures import Sample, Size, Target


@dataclass(frozen=True, slots=True)
class Tile:
    """A sample whose top left corner lies at (x, y) of a canvas."""

    sample: Sample
    x: int
    y: int


class Mosaic:
    """Lays tiles out on a canvas of twice the size, and warps that to `size` x `size`.

    The result has the id and path of its first image; it is on no disk, so `original_size` is its own size.

    Args:
        size: side of the result in pixels; the longer side of every tile is resized to it.
        nine: share of mosaics made of nine images instead of four.
        p: share of samples that are mosaics; the others are one image in a letterbox, warped alike.
        affine: how the canvas is warped; None takes the published amounts.

    Raises:
        UserError: if an argument is out of range, or `affine` has a size of its own.
    """

    def __init__(self, size: int, *, nine: float = 0.2, p: float = 1.0, affine: RandomAffine | None = None) -> None:
        if size < 2 or not 0 <= nine <= 1 or not 0 <= p <= 1:
            raise UserError(f"size ({size}) must be at least 2, nine ({nine}) and p ({p}) must lie in 0..1")
        self.size = size
        self.nine = nine
        self.p = p
        self.affine = RandomAffine() if affine is None else affine
        if self.affine.size not in (None, size):
            raise UserError(f"affine.size is {self.affine.size}, but the mosaic's is {size}: leave affine.size out")
        self.letterbox = Letterbox(size, fill=self.affine.fill)

    def __call__(self, dataset: Indexable[Sample], index: int, generator: Generator) -> Sample:
        if not chance(self.p, generator):
            return self.affine(self.letterbox(dataset[index], generator), generator)
        draw = nine_tiles if chance(self.nine, generator) else four_tiles
        tiles = draw(dataset, index, self.size, generator)
        canvas, size = (2 * self.size, 2 * self.size), (self.size, self.size)
        matrix = self.affine.draw(canvas, size, generator)
        image = warp_image(stitch(tiles, canvas, self.affine.fill), matrix, size, self.affine.fill)
        # Tile by tile, because masks of the whole canvas would be large.
        targets = [warp_target(tile.sample.target, matrix @ shift(tile.x, tile.y), size) for tile in tiles]
        return Sample(image, merge(targets, size))


def four_tiles(dataset: Indexable[Sample], index: int, size: int, generator: Generator) -> list[Tile]:
    """Four images that meet at a random point in the middle half of a canvas of 2 size x 2 size.

    Args:
        dataset: where the three others come from, any image with equal probability.
        index: the first image.
        size: the longer side of each image.
        generator: for the point and the others.
    """
    samples = _draw(dataset, index, 3, size, generator)
    x, y = torch.randint(size // 2, 3 * size // 2 + 1, (2,), generator=generator).tolist()
    tiles = []
    for place, sample in enumerate(samples):
        height, width = sample.image.shape[-2:]
        tiles.append(Tile(sample, x - width * (place % 2 == 0), y - height * (place < 2)))
    return _visible(tiles, (2 * size, 2 * size))


def nine_tiles(dataset: Indexable[Sample], index: int, size: int, generator: Generator) -> list[Tile]:
    """One image in the middle of a canvas of 3 size x 3 size, eight around it; a random part of 2 size x 2 size.

    See `four_tiles` for the arguments.
    """
    samples = _draw(dataset, index, 8, size, generator)
    left, top = torch.randint(size + 1, (2,), generator=generator).tolist()
    corners = spiral([(sample.image.shape[-2], sample.image.shape[-1]) for sample in samples], 3 * size)
    tiles = [Tile(sample, x - left, y - top) for sample, (x, y) in zip(samples, corners, strict=True)]
    return _visible(tiles, (2 * size, 2 * size))


def spiral(sizes: Sequence[Size], canvas: int) -> list[tuple[int, int]]:
    """Top left corners (x, y) of nine tiles: one in the middle of a square canvas, the others clockwise around it.

    From each corner of the middle tile two tiles go along one of its sides and beyond, so no two overlap.

    Args:
        sizes: (H, W) of the nine.
        canvas: its side.
    """
    height, width = sizes[0]
    x, y = (canvas - width) // 2, (canvas - height) // 2
    corners = [(x, y)]
    for side in range(4):  # above, right, below, left
        reach = 0
        for h, w in sizes[1 + 2 * side : 3 + 2 * side]:
            above, right = (x + reach, y - h), (x + width, y + reach)
            below, left = (x + width - reach - w, y + height), (x - w, y + height - reach - h)
            corners.append((above, right, below, left)[side])
            reach += h if side % 2 else w
    return corners


def stitch(tiles: Sequence[Tile], canvas: Size, fill: int = FILL) -> Tensor:
    """(3, H, W) uint8: the images of tiles that lie on a canvas (H, W), and `fill` between them."""
    image = torch.full((3, *canvas), fill, dtype=torch.uint8)
    for tile in tiles:
        height, width = tile.sample.image.shape[-2:]
        image[:, tile.y : tile.y + height, tile.x : tile.x + width] = tile.sample.image
    return image


def merge(targets: Sequence[Target], size: Size) -> Target:
    """All objects of targets in the same pixels of one image of `size`, under the name of the first."""
    masks = [target.masks for target in targets if target.masks is not None]
    return replace(
        targets[0],
        boxes=torch.cat([target.boxes for target in targets]),
        labels=torch.cat([target.labels for target in targets]),
        crowd=torch.cat([target.crowd for target in targets]),
        masks=torch.cat(masks) if len(masks) == len(targets) else None,
        area=None,
        original_size=size,
        difficulty=None,
        segmentations=None,
        truth=None,
    )


def _draw(dataset: Indexable[Sample], index: int, others: int, size: int, generator: Generator) -> list[Sample]:
    indices = torch.randint(len(dataset), (others,), generator=generator).tolist()
    return [resize_longest(dataset[i], size) for i in (index, *indices)]


def _visible(tiles: Sequence[Tile], canvas: Size) -> list[Tile]:
    """What of the tiles lies on the canvas; boxes are clipped, to nothing if need be."""
    cut = []
    for tile in tiles:
        height, width = tile.sample.image.shape[-2:]
        left, top = max(-tile.x, 0), max(-tile.y, 0)
        right, bottom = min(canvas[1] - tile.x, width), min(canvas[0] - tile.y, height)
        if left < right and top < bottom:
            cut.append(Tile(_crop(tile.sample, left, top, right, bottom), tile.x + left, tile.y + top))
    return cut


def _crop(sample: Sample, left: int, top: int, right: int, bottom: int) -> Sample:
    target = sample.target
    corner = torch.tensor([left, top] * 2, dtype=target.boxes.dtype)
    limits = torch.tensor([right - left, bottom - top] * 2, dtype=target.boxes.dtype)
    boxes = (target.boxes - corner).clamp(min=torch.zeros_like(corner), max=limits)
    masks = None if target.masks is None else target.masks[:, top:bottom, left:right]
    image = sample.image[:, top:bottom, left:right]
    return Sample(image, replace(target, boxes=boxes, masks=masks))
