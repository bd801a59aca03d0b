"""Pasting objects, cut out along their masks, into other images."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor
from torchvision.ops import box_area
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from dyndet.data.affine import tight_box
from dyndet.data.mosaic import four_tiles, merge
from dyndet.data.sampler import Indexable, Mix
from dyndet.data.transforms import chance, uniform
from dyndet.errors import UserError
from dyndet.structures import Sample, Size, Target

Place = tuple[int, int, int, int]
"""Pixels x1, y1, x2, y2."""

SCALES = (0.75,) * 2 + (0.5,) * 4 + (0.25,) * 4 + (0.125,) * 4 + (0.0625,) * 6
"""Largest sides of the places tried in one image, as share of its own."""

SKIP = 0.2
MAX_COVERED = 0.3
MIN_PLACE, MIN_SIDE, MIN_PIXELS = 20, 10, 60
MAX_MOSAICS = 10


@dataclass(frozen=True, slots=True)
class Cutout:
    """An object of class `label`: its pixels (3, H, W) and which of them are its own, (H, W) bool."""

    image: Tensor
    mask: Tensor
    label: int


class PasteObjects:
    """Pastes objects of other images wherever they cover little of what is there.

    Twenty places of falling size are tried. Objects come from random mosaics, half of those of each; crowd regions are
    never taken. Pasted pixels leave the masks of what they cover; the boxes below stay, since little is covered.

    In the published pipeline colours change before, here after pasting: objects change with the image around them.

    Args:
        base: what makes one sample: `Mosaic` or `MixUp`.
        p: share of samples that objects are pasted into.
        count: cut-outs to choose from; fewer when ten mosaics do not have so many.

    Raises:
        UserError: if an argument is out of range; if p is above 0 and the data comes without masks.
    """

    def __init__(self, base: Mix, *, p: float = 0.15, count: int = 30) -> None:
        if not 0 <= p <= 1 or count < 1:
            raise UserError(f"p ({p}) must lie in 0..1 and count ({count}) must be at least 1")
        self.base = base
        self.p = p
        self.count = count

    def __call__(self, dataset: Indexable[Sample], index: int, generator: Generator) -> Sample:
        sample = self.base(dataset, index, generator)
        if self.p:
            _masks(sample.target)  # otherwise found missing only now and then
        if not chance(self.p, generator):
            return sample
        return paste(sample, self._gather(dataset, max(sample.image.shape[-2:]), generator), generator)

    def _gather(self, dataset: Indexable[Sample], size: int, generator: Generator) -> list[Cutout]:
        cutouts: list[Cutout] = []
        for _ in range(MAX_MOSAICS):
            index = int(torch.randint(len(dataset), (), generator=generator))
            found = [item for tile in four_tiles(dataset, index, size, generator) for item in cut_out(tile.sample)]
            order = torch.randperm(len(found), generator=generator).tolist()
            cutouts += [found[i] for i in order[: -(-len(found) // 2)]]
            if len(cutouts) >= self.count:
                break
        return cutouts


def cut_out(sample: Sample) -> list[Cutout]:
    """Every object that trains and is seen, cut to the tight box of its mask."""
    target, cutouts = sample.target.without_crowd(), []
    for mask, label in zip(_masks(target), target.labels.tolist(), strict=True):
        x1, y1, x2, y2 = tight_box(mask.numpy()).tolist()
        if x2 > x1:
            cutouts.append(Cutout(sample.image[:, y1:y2, x1:x2], mask[y1:y2, x1:x2], label))
    return cutouts


def paste(sample: Sample, cutouts: list[Cutout], generator: Generator) -> Sample:
    """The sample, which has masks, with cut-outs where there is room.

    A place is a random box up to a share of the image (`SCALES`), tried with probability 0.8. It is good if both sides
    exceed 20 pixels and no object is covered by 30 % of its box or more. A random cut-out is fitted into its middle,
    and pasted if its sides exceed 10 pixels and its mask 60.
    """
    image, target = sample.image.clone(), sample.target
    size = (image.shape[-2], image.shape[-1])
    masks = _masks(target).clone()
    pasted: list[Target] = []
    for scale in SCALES:
        if not cutouts or chance(SKIP, generator):
            continue
        x1, y1, x2, y2 = place = _place(size, scale, generator)
        boxes = torch.cat([target.boxes, *(item.boxes for item in pasted)])
        if min(x2 - x1, y2 - y1) <= MIN_PLACE or _covered(boxes, place) >= MAX_COVERED:
            continue
        cutout = _fitted(cutouts[int(torch.randint(len(cutouts), (), generator=generator))], y2 - y1, x2 - x1)
        if cutout is None:
            continue
        height, width = cutout.mask.shape
        x, y = (x1 + x2 - width) // 2, (y1 + y2 - height) // 2
        window = (slice(None), slice(y, y + height), slice(x, x + width))
        image[window] = torch.where(cutout.mask, cutout.image, image[window])
        for below in (masks, *(_masks(item) for item in pasted)):
            below[window] &= ~cutout.mask
        pasted.append(_object(cutout, x, y, size))
    return Sample(image, merge([replace(target, masks=masks), *pasted], size))


def _masks(target: Target) -> Tensor:
    if target.masks is None:
        raise UserError(
            "pasting objects needs masks, but the training set gives none: set data.masks=true (or take the preset "
            "data/augment=yolo_masks), or paste nothing with data.augment.paste=0"
        )
    return target.masks


def _place(size: Size, scale: float, generator: Generator) -> Place:
    """A random box, clipped to the image."""
    height, width = size
    sides = [uniform(1, max(scale * side, 1), generator) for side in (width, height)]
    centres = [uniform(0, side, generator) for side in (width, height)]
    x1, y1 = (max(int(centre - side / 2), 0) for centre, side in zip(centres, sides, strict=True))
    x2, y2 = (int(centre + side / 2) for centre, side in zip(centres, sides, strict=True))
    return x1, y1, min(x2, width), min(y2, height)


def _covered(boxes: Tensor, place: Place) -> float:
    """The largest share of any box (N, 4) that the place covers."""
    if not len(boxes):
        return 0.0
    x1, y1, x2, y2 = place
    common = boxes.clamp(boxes.new_tensor([x1, y1, x1, y1]), boxes.new_tensor([x2, y2, x2, y2]))
    return float((box_area(common) / box_area(boxes)).amax())


def _fitted(cutout: Cutout, height: int, width: int) -> Cutout | None:
    """As large as fits, with its aspect ratio; None when too little is left."""
    old_height, old_width = cutout.mask.shape
    factor = min(height / old_height, width / old_width)
    size = [round(old_height * factor), round(old_width * factor)]
    if min(size) <= MIN_SIDE:
        return None
    mask = tv.resize(cutout.mask[None].byte(), size, InterpolationMode.NEAREST_EXACT)[0].bool()
    if int(mask.sum()) <= MIN_PIXELS:
        return None
    return Cutout(tv.resize(cutout.image, size, InterpolationMode.BILINEAR, antialias=True), mask, cutout.label)


def _object(cutout: Cutout, x: int, y: int, size: Size) -> Target:
    """One object of an image of `size`."""
    height, width = cutout.mask.shape
    mask = torch.zeros(1, *size, dtype=torch.bool)
    mask[0, y : y + height, x : x + width] = cutout.mask
    box = torch.tensor([[x, y, x + width, y + height]], dtype=torch.float32)
    return Target(box, torch.tensor([cutout.label]), torch.tensor([False]), mask)
