from __future__ import annotations

import pytest
import torch

from dyndet.data.mosaic import Mosaic, four_tiles
from dyndet.data.paste import SCALES, Cutout, PasteObjects, cut_out, paste
from dyndet.data.sampler import Indexable, keyed_generator
from dyndet.data.shapes import ShapesDataset
from dyndet.errors import UserError
from dyndet.structures import Sample, Target

SIZE = 120
PASTED = 50


def scene(*boxes: tuple[int, int, int, int]) -> Sample:
    """Grey objects on black, in classes 0, 1, ..."""
    masks = torch.zeros(len(boxes), SIZE, SIZE, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = True
    count = len(boxes)
    target = Target(
        torch.tensor(boxes).float().reshape(-1, 4),
        torch.arange(count),
        torch.zeros(count, dtype=torch.bool),
        masks,
        torch.ones(count),
        image_id=3,
        segmentations=[[[*box]] for box in boxes],
    )
    return Sample(masks.any(0).mul(100).to(torch.uint8).repeat(3, 1, 1), target)


def disc(height: int = 40, width: int = 80, label: int = PASTED) -> Cutout:
    """A white ellipse on a green ground."""
    y, x = (torch.linspace(-1, 1, side + 1)[1:] - 1 / side for side in (height, width))
    image = torch.tensor([0, 255, 0], dtype=torch.uint8)[:, None, None].repeat(1, height, width)
    mask = (y[:, None] ** 2 + x**2) < 1
    image[:, mask] = 255
    return Cutout(image, mask, label)


def test_pasted_objects_keep_the_rules() -> None:
    sample, counts = scene((10, 10, 40, 40), (60, 70, 110, 90)), []
    for seed in range(150):
        result = paste(sample, [disc()], keyed_generator(seed))
        target, masks = result.target, result.target.masks
        assert masks is not None and sample.target.masks is not None
        assert torch.equal(target.boxes[:2], sample.target.boxes) and target.labels[:2].tolist() == [0, 1]
        assert (target.labels[2:] == PASTED).all() and not target.crowd.any()
        assert len(masks) == len(target.boxes) and target.area is None and target.image_id == 3
        assert target.segmentations is None  # those on disk would be too few
        sides = target.boxes[2:, 2:] - target.boxes[2:, :2]
        assert (sides > 10).all()
        assert ((sides[:, 0] / sides[:, 1] - 2).abs() < 0.2).all()  # twice as wide as high
        assert (target.boxes >= 0).all() and (target.boxes <= SIZE).all()
        for later in range(2, len(target.boxes)):
            below, box = target.boxes[:later], target.boxes[later]
            common = (torch.minimum(below[:, 2:], box[2:]) - torch.maximum(below[:, :2], box[:2])).clamp(min=0).prod(1)
            assert (common / (below[:, 2:] - below[:, :2]).prod(1)).max() < 0.3
        assert masks.sum(0).max() <= 1
        painted = masks[2:].any(0)
        assert (result.image[1, painted] == 255).all()  # white, or blurred with its ground
        assert torch.equal(result.image[:, ~painted], sample.image[:, ~painted])
        assert torch.equal(masks[:2] | (sample.target.masks & painted), sample.target.masks)
        counts.append(len(sides))
    assert max(counts) > 2 and min(counts) < 2
    before = scene((10, 10, 40, 40), (60, 70, 110, 90))
    assert torch.equal(sample.image, before.image)
    assert sample.target.masks is not None and before.target.masks is not None
    assert torch.equal(sample.target.masks, before.target.masks)


def test_places_are_tried_with_their_probability_and_scale() -> None:
    assert [SCALES.count(scale) for scale in (0.75, 0.5, 0.25, 0.125, 0.0625)] == [2, 4, 4, 4, 6]
    square = Cutout(torch.full((3, 300, 300), 255, dtype=torch.uint8), torch.ones(300, 300, dtype=torch.bool), 1)
    big = Sample(torch.zeros(3, 300, 300, dtype=torch.uint8), scene().target)
    big.target.masks = torch.zeros(0, 300, 300, dtype=torch.bool)
    results = [paste(big, [square], keyed_generator(seed)).target.boxes for seed in range(60)]
    sides = torch.cat([(boxes[:, 2:] - boxes[:, :2]).amax(1) for boxes in results])
    assert 0.6 * 300 < sides.max() <= 0.75 * 300
    assert sides.min() > 20
    first = torch.tensor([len(boxes) and float((boxes[0, 2:] - boxes[0, :2]).amax()) > 150 for boxes in results])
    assert 0.05 < first.float().mean() < 0.6  # only the first two places are so large


def test_nothing_is_pasted_where_there_is_no_room() -> None:
    full = scene(*[(x, y, x + 10, y + 10) for x in range(0, SIZE, 10) for y in range(0, SIZE, 10)])
    for seed in range(40):  # any place of more than 20 pixels covers one of these squares
        assert len(paste(full, [disc()], keyed_generator(seed)).target.boxes) == 144


@pytest.mark.parametrize("cutout", [disc(400, 4), disc(8, 200)])
def test_slivers_are_not_pasted(cutout: Cutout) -> None:
    for seed in range(40):
        assert not len(paste(scene(), [cutout], keyed_generator(seed)).target.boxes)


def test_objects_of_too_few_pixels_are_not_pasted() -> None:
    line = Cutout(torch.zeros(3, 100, 100, dtype=torch.uint8), torch.eye(100, dtype=torch.bool), 1)
    results = [paste(scene(), [line], keyed_generator(seed)).target.masks for seed in range(60)]
    pixels = torch.cat([masks.sum((1, 2)) for masks in results if masks is not None])
    assert len(pixels) and pixels.min() > 60  # of a side of as many


def test_cut_outs_are_tight_and_no_crowds() -> None:
    sample = scene((10, 20, 50, 60), (70, 70, 110, 100), (0, 0, 5, 5))
    sample.target.crowd[1] = True
    assert sample.target.masks is not None
    sample.target.masks[0, :, 40:] = False  # tighter than its box
    sample.target.masks[2] = False  # nothing to see
    (cutout,) = cut_out(sample)
    assert cutout.label == 0 and cutout.mask.shape == (40, 30) and cutout.mask.all()
    assert torch.equal(cutout.image, sample.image[:, 20:60, 10:40])


class Counting(ShapesDataset):
    reads = 0

    def __getitem__(self, index: int) -> Sample:
        self.reads += 1
        return super().__getitem__(index)


def one(data: Indexable[Sample], index: int, generator: torch.Generator) -> Sample:
    return data[index]


def test_share_of_samples_and_how_many_cut_outs() -> None:
    data = Counting(length=20, size=64, load_masks=True)
    mix, reads = PasteObjects(one, p=0.15, count=10), []
    for key in range(250):
        data.reads = 0
        mix(data, key % 20, keyed_generator(key))
        reads.append(data.reads)
    share = sum(count > 1 for count in reads) / 250
    assert share == pytest.approx(0.15, abs=0.08)
    assert {count % 4 for count in reads} == {1}  # whole mosaics
    assert max(reads) <= 1 + 4 * 10


def test_half_of_a_mosaic_is_cut_out() -> None:
    data = ShapesDataset(length=20, size=64, load_masks=True)
    for seed in range(5):
        generator = keyed_generator(seed)
        tiles = four_tiles(data, int(torch.randint(20, (), generator=generator)), 64, generator)
        objects = sum(len(cut_out(tile.sample)) for tile in tiles)
        gathered = PasteObjects(one, count=1)._gather(data, 64, keyed_generator(seed))
        assert len(gathered) == -(-objects // 2)
    assert 30 <= len(PasteObjects(one, count=30)._gather(data, 64, keyed_generator(0))) < 60


def test_after_mosaics_with_exact_keys() -> None:
    data = ShapesDataset(length=8, size=64, load_masks=True)
    mix = PasteObjects(Mosaic(96), p=1)
    first, again = (mix(data, 3, keyed_generator(0, 5, 3)) for _ in range(2))
    assert torch.equal(first.image, again.image) and torch.equal(first.target.boxes, again.target.boxes)
    assert first.image.shape == (3, 96, 96) and first.target.original_size == (96, 96)


def test_without_masks_it_says_so() -> None:
    data = ShapesDataset(length=8, size=64)
    for key in range(5):  # at once, not only when it is to paste
        with pytest.raises(UserError, match=r"needs masks.*data\.masks=true.*data\.augment\.paste=0"):
            PasteObjects(Mosaic(64), p=0.15)(data, 0, keyed_generator(key))
    assert PasteObjects(Mosaic(64), p=0)(data, 0, keyed_generator(0)).target.masks is None


@pytest.mark.parametrize("wrong", [{"p": 1.5}, {"count": 0}])
def test_wrong_arguments(wrong) -> None:
    with pytest.raises(UserError):
        PasteObjects(one, **wrong)
