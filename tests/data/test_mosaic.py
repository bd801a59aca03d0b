from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from dyndet.data.affine import RandomAffine
from dyndet.data.collate import Collate
from dyndet.data.mixup import MixUp, blend
from dyndet.data.mosaic import Mosaic, Tile, four_tiles, nine_tiles, spiral, stitch
from dyndet.data.sampler import Indexable, KeyedDataset, keyed_generator
from dyndet.data.transforms import Compose, DropMasks, RandomHorizontalFlip
from dyndet.errors import UserError
from dyndet.structures import Sample, Target


class Plain:
    """Image i is all of colour i and has one object, of class i, that fills it; the read indices are kept."""

    def __init__(self, length: int, size: tuple[int, int] = (8, 8), masks: bool = False) -> None:
        self.length = length
        self.size = size
        self.masks = masks
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        self.read.append(index)
        height, width = self.size
        target = Target(
            torch.tensor([[0.0, 0, width, height]]),
            torch.tensor([index]),
            torch.tensor([index % 2 == 1]),
            torch.ones(1, height, width, dtype=torch.bool) if self.masks else None,
            torch.tensor([float(height * width)]),
            image_id=index,
            original_size=self.size,
            path=f"{index}.jpg",
            difficulty=0.5,
        )
        return Sample(torch.full((3, height, width), index % 256, dtype=torch.uint8), target)


class Bright(Plain):
    """Image 0 holds a white rectangle, the others nothing but the grey of gaps."""

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        inside = torch.zeros(1, 60, 80, dtype=torch.bool)
        inside[:, 10:50, 20:64] = index == 0
        sample.image = torch.where(inside, 255, 114).to(torch.uint8).repeat(3, 1, 1)
        sample.target.boxes = torch.tensor([[20.0, 10, 64, 50]])
        sample.target.masks = inside if self.masks else None
        sample.target = sample.target[torch.tensor([index == 0])]
        return sample


def extent(inside: Tensor) -> Tensor:
    points = inside.nonzero().flip(1)
    return torch.cat([points.amin(0), points.amax(0) + 1]).float()


def corners(tile: Tile) -> tuple[int, int, int, int]:
    height, width = tile.sample.image.shape[-2:]
    return tile.x, tile.y, tile.x + width, tile.y + height


def test_four_images_meet_at_a_point() -> None:
    data, points = Plain(40, (15, 20)), []
    for seed in range(300):
        tiles = four_tiles(data, 7, 40, keyed_generator(seed))  # images of 30 x 40
        assert tiles[0].sample.target.image_id == 7
        first, second, third, fourth = (corners(tile) for tile in tiles)
        x, y = first[2:]
        assert (second[0], second[3]) == (third[2], third[1]) == fourth[:2] == (x, y)
        assert first[:2] == (max(x - 40, 0), max(y - 30, 0)) and fourth[2:] == (min(x + 40, 80), min(y + 30, 80))
        for tile in tiles:
            height, width = tile.sample.image.shape[-2:]
            assert tile.sample.target.boxes.tolist() == [[0, 0, width, height]]
        points.append((x, y))
    for place in torch.tensor(points).T:
        assert (place.min(), place.max()) == (20, 60)
        assert float(place.float().mean()) == pytest.approx(40, abs=2.5)


def test_other_images_are_drawn_uniformly_with_replacement() -> None:
    data = Plain(5)
    for seed in range(800):
        four_tiles(data, 3, 8, keyed_generator(seed))
    others = Counter(data.read)
    others[3] -= 800
    assert others.total() == 2400
    assert all(abs(count - 480) < 90 for count in others.values())  # 4.6 standard deviations


def test_nine_equal_squares_fill_the_canvas_clockwise() -> None:
    middle, *around = spiral([(10, 10)] * 9, 30)
    assert middle == (10, 10)
    assert around == [(10, 0), (20, 0), (20, 10), (20, 20), (10, 20), (0, 20), (0, 10), (0, 0)]


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=9, max_size=9))
def test_nine_tiles_touch_but_never_overlap(sizes: list[tuple[int, int]]) -> None:
    boxes = [(x, y, x + w, y + h) for (x, y), (h, w) in zip(spiral(sizes, 90), sizes, strict=True)]
    for index, (x1, y1, x2, y2) in enumerate(boxes):
        for a1, b1, a2, b2 in boxes[:index]:
            assert min(x2, a2) <= max(x1, a1) or min(y2, b2) <= max(y1, b1)
    above, above_right, right, below_right, below, below_left, left, above_left = boxes[1:]
    x1, y1, x2, y2 = boxes[0]
    assert above[0] == x1 and above[3] == above_right[3] == y1 and above_right[0] == above[2]
    assert right[1] == y1 and right[0] == below_right[0] == x2 and below_right[1] == right[3]
    assert below[2] == x2 and below[1] == below_left[1] == y2 and below_left[2] == below[0]
    assert left[3] == y2 and left[2] == above_left[2] == x1 and above_left[3] == left[1]


def test_nine_tiles_are_seen_through_a_random_window() -> None:
    data, offsets = Plain(20), set()
    for seed in range(200):
        tiles = nine_tiles(data, 4, 8, keyed_generator(seed))
        assert tiles[0].sample.target.image_id == 4
        x1, y1, x2, y2 = corners(tiles[0])
        assert (x2 - x1, y2 - y1) == (8, 8)  # never cut
        offsets.add((x1, y1))
        assert stitch(tiles, (16, 16), 255).max() < 20  # squares leave no gap
        assert sum(tile.sample.image[0].numel() for tile in tiles) == 256
    assert {x for x, _ in offsets} == {y for _, y in offsets} == set(range(9))


@pytest.mark.parametrize(
    ("mix", "expected"), [(Mosaic(4), {4: 0.8, 9: 0.2}), (Mosaic(4, nine=0.5, p=0.6), {1: 0.4, 4: 0.3, 9: 0.3})]
)
def test_shares_of_images_made_of_so_many(mix: Mosaic, expected: dict[int, float]) -> None:
    data, counts, keys = Plain(50, (4, 4)), Counter[int](), 400
    for key in range(keys):
        data.read.clear()
        mix(data, key % 50, keyed_generator(0, 0, key))
        assert data.read[0] == key % 50
        counts[len(data.read)] += 1
    check_shares(counts, expected, keys)


def check_shares(counts: Counter[int], expected: dict[int, float], total: int) -> None:
    """Within four standard deviations."""
    assert set(counts) <= set(expected)
    for kind, share in expected.items():
        assert counts[kind] / total == pytest.approx(share, abs=4 * (share * (1 - share) / total) ** 0.5)


def test_share_of_blends() -> None:
    def base(data: Indexable[Sample], index: int, generator: torch.Generator) -> Sample:
        return data[index]

    data, counts = Plain(50), Counter[int]()
    for key in range(1000):
        data.read.clear()
        MixUp(base, p=0.15)(data, key % 50, keyed_generator(0, 0, key))
        counts[len(data.read)] += 1
    check_shares(counts, {1: 0.85, 2: 0.15}, 1000)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("nine", [0, 1])
def test_a_rectangle_stays_in_its_box(nine: int, masks: bool) -> None:
    data, affine = Bright(10_000, masks=masks), RandomAffine(scale=(0.7, 1.6), translate=0.1)
    seen = 0
    for seed in range(25):
        result = Mosaic(100, nine=nine, affine=affine)(data, 0, keyed_generator(seed))
        assert result.image.shape == (3, 100, 100)
        bright = result.image[0] > 184
        if len(result.target.boxes) != 1:
            assert bright.float().mean() < 0.08  # less than a tenth of it
            continue
        assert (extent(bright) - result.target.boxes[0]).abs().max() <= 1
        if masks:
            assert result.target.masks is not None
            assert (result.target.masks[0] != bright).float().mean() < 0.02
        seen += 1
    assert seen >= 10


def test_a_mosaic_is_an_image_of_its_own() -> None:
    unmoved = RandomAffine(scale=(0.5, 0.5), translate=0)  # the whole canvas
    result = Mosaic(64, nine=0, affine=unmoved)(Plain(100, (32, 32), masks=True), 7, keyed_generator(1))
    target = result.target
    assert (target.image_id, target.path, target.original_size) == (7, "7.jpg", (64, 64))
    assert target.area is None and target.difficulty is None
    assert len(target.labels) == 4 and target.labels[0] == 7
    assert torch.equal(target.crowd, target.labels % 2 == 1)
    assert target.masks is not None and target.masks.shape == (4, 64, 64)
    for mask, label, box in zip(target.masks, target.labels, target.boxes, strict=True):
        assert torch.equal(extent(mask), box)
        inner = result.image[0, int(box[1]) + 1 : int(box[3]) - 1, int(box[0]) + 1 : int(box[2]) - 1]
        assert (inner == label).all()
    without = Mosaic(64, nine=0, affine=unmoved)(Plain(100, (32, 32)), 7, keyed_generator(1)).target
    assert (without.boxes - target.boxes).abs().max() <= 0.5
    batch = Collate(32)([result])
    assert batch.images.pixels.shape == (1, 3, 64, 64)


def test_without_a_mosaic_one_image_lies_in_a_letterbox() -> None:
    unmoved = RandomAffine(scale=(1, 1), translate=0)
    result = Mosaic(64, p=0, affine=unmoved)(Plain(100, (16, 32)), 7, keyed_generator(1))
    assert result.target.boxes.tolist() == [[0, 16, 64, 48]] and result.target.original_size == (16, 32)
    assert (result.image[:, 16:48] == 7).all() and (result.image[:, :16] == 114).all()


def test_images_without_objects_mix() -> None:
    for masks in (False, True):
        data = Bright(10_000, masks=masks)
        for seed in range(4):
            result = MixUp(Mosaic(32), p=1)(data, 5, keyed_generator(seed))
            assert result.target.boxes.shape == (0, 4)
            assert (result.image == 114).all()
            assert not masks or (result.target.masks is not None and result.target.masks.shape == (0, 32, 32))


def test_blending() -> None:
    first, second = Plain(256)[200], Plain(256)[101]
    result = blend(first, second, 0.25)
    assert result.image.unique().tolist() == [126]  # 50 + 75.75
    assert result.target.labels.tolist() == [200, 101] and result.target.crowd.tolist() == [False, True]
    assert result.target.boxes.tolist() == [[0, 0, 8, 8]] * 2
    assert result.target.area is None and result.target.image_id == 200
    assert torch.equal(blend(first, second, 1).image, first.image)
    with pytest.raises(UserError, match=r"\(8, 8\) and \(4, 4\)"):
        blend(first, Plain(3, (4, 4))[0], 0.5)


def test_the_share_of_a_blend_is_beta_distributed() -> None:
    def base(data: Indexable[Sample], index: int, generator: torch.Generator) -> Sample:
        return Sample(torch.full((3, 1, 1), 255 * (index == 0), dtype=torch.uint8), data[index].target)

    data = Plain(100_000)
    for c in (8, 2):
        mix = MixUp(base, p=1, concentration=c)
        shares = torch.tensor([int(mix(data, 0, keyed_generator(seed)).image[0]) / 255 for seed in range(1500)])
        deviation = (1 / (4 * (2 * c + 1))) ** 0.5
        assert float(shares.mean()) == pytest.approx(0.5, abs=4 * deviation / 1500**0.5)
        assert float(shares.std()) == pytest.approx(deviation, rel=0.08)


def same(a: Sample, b: Sample) -> bool:
    return torch.equal(a.image, b.image) and torch.equal(a.target.boxes, b.target.boxes)


def keyed(seed: int = 0) -> KeyedDataset:
    transform = Compose([RandomHorizontalFlip(), DropMasks()])
    return KeyedDataset(Plain(6, (24, 32), masks=True), transform, seed, MixUp(Mosaic(32), p=0.5))


def test_samples_depend_on_their_key_only() -> None:
    keys = [(epoch, index) for epoch in range(4) for index in range(6)]
    first = {key: keyed()[key] for key in keys}
    data = keyed()
    torch.rand(3)
    assert all(same(data[key], first[key]) for key in reversed(keys))
    assert not any(same(first[0, index], first[1, index]) for index in range(6))
    assert not any(same(keyed(1)[0, index], first[0, index]) for index in range(6))
    assert all(sample.target.masks is None for sample in first.values())


def test_workers_change_nothing() -> None:
    keys = [(epoch, index) for epoch in range(2) for index in range(6)]
    loader = DataLoader(keyed(), sampler=keys, batch_size=None, num_workers=2)  # pyright: ignore[reportArgumentType]
    assert all(same(sample, keyed()[key]) for key, sample in zip(keys, loader, strict=True))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Mosaic(1),
        lambda: Mosaic(8, nine=2),
        lambda: Mosaic(8, p=-1),
        lambda: Mosaic(8, affine=RandomAffine(size=9)),
        lambda: MixUp(Mosaic(8), p=2),
        lambda: MixUp(Mosaic(8), concentration=0),
    ],
)
def test_wrong_arguments(build) -> None:
    with pytest.raises(UserError):
        build()
