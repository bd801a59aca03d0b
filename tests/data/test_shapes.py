from __future__ import annotations

import pytest
import torch

from dyndet.data.shapes import KINDS, ShapesDataset
from dyndet.errors import UserError


def tight_box(mask: torch.Tensor) -> list[float]:
    rows, columns = mask.nonzero().unbind(1)
    return [float(x) for x in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]


def test_images_depend_on_seed_and_index_only():
    one, same, other = (ShapesDataset(length=8, seed=seed) for seed in (3, 3, 4))
    later = same[5]
    assert torch.equal(one[5].image, later.image)
    assert torch.equal(one[5].target.boxes, later.target.boxes)
    assert not torch.equal(one[5].image, other[5].image)
    assert not torch.equal(one[5].image, one[6].image)


def test_masks_do_not_change_the_picture():
    plain, masked = ShapesDataset(length=4), ShapesDataset(length=4, load_masks=True)
    assert all(torch.equal(plain[i].image, masked[i].image) for i in range(4))
    assert plain[0].target.masks is None


@pytest.mark.parametrize("size", [(128, 128), (96, 160), (200, 64), (32, 32)])
def test_boxes_are_the_tight_boxes_of_disjoint_masks(size):
    for sample in ShapesDataset(length=20, size=size, num_classes=10, load_masks=True):
        target = sample.target
        assert sample.image.shape == (3, *size)
        assert sample.image.dtype == torch.uint8
        assert sample.image.is_contiguous()
        assert target.original_size == size
        assert target.masks is not None
        assert target.masks.shape == (len(target.labels), *size)
        assert target.boxes.tolist() == [tight_box(mask) for mask in target.masks]
        assert target.masks.sum(0).max() <= 1
        assert len(target.labels) >= 1
        assert not target.crowd.any()


def test_difficulty_means_more_smaller_objects():
    samples = [ShapesDataset(length=300, hard_fraction=0.3)[i] for i in range(300)]
    difficulty = torch.tensor([sample.target.difficulty for sample in samples])
    count = torch.tensor([float(len(sample.target.labels)) for sample in samples])
    area = torch.stack([(box[:, 2:] - box[:, :2]).prod(1).mean() for box in (s.target.boxes for s in samples)])
    roughness = torch.stack([s.image.float().diff(dim=2).abs().mean() for s in samples])
    assert 0 <= difficulty.min() < 0.1
    assert 0.9 < difficulty.max() < 1
    assert float((difficulty >= 0.5).float().mean()) == pytest.approx(0.3, abs=0.08)
    assert torch.corrcoef(torch.stack([difficulty, count]))[0, 1] > 0.8
    assert torch.corrcoef(torch.stack([difficulty, area]))[0, 1] < -0.4
    assert torch.corrcoef(torch.stack([difficulty, roughness]))[0, 1] > 0.7


def test_the_share_of_hard_images_is_kept():
    for fraction in (0.0, 1.0):
        data = ShapesDataset(length=30, hard_fraction=fraction)
        assert {float(sample.target.difficulty or 0) >= 0.5 for sample in data} == {bool(fraction)}


def test_sides_span_the_levels():
    sides = torch.cat([(b[:, 2:] - b[:, :2]).amax(1) for b in (s.target.boxes for s in ShapesDataset(length=300))])
    assert sides.min() < 14
    assert sides.max() > 70
    assert ((sides > 24) & (sides < 48)).float().mean() > 0.2


def test_all_classes_occur_and_are_named():
    data = ShapesDataset(length=100, num_classes=len(KINDS))
    assert len(KINDS) >= 8
    assert [category.name for category in data.categories] == list(KINDS)
    assert [category.id for category in data.categories] == list(range(1, len(KINDS) + 1))
    assert set(torch.cat([sample.target.labels for sample in data]).tolist()) == set(range(len(KINDS)))
    assert len(data.sizes) == len(data) == 100


def test_shapes_are_distinct():
    line = (torch.arange(32) * 2 / 31 - 1).numpy()
    masks = [torch.from_numpy(inside(line[None, :], line[:, None])).float() for inside in KINDS.values()]
    for i, mask in enumerate(masks):
        for other in masks[:i]:
            assert (mask * other).sum() / torch.maximum(mask, other).sum() < 0.93


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes is 0"),
        ({"num_classes": 99}, "num_classes is 99"),
        ({"size": 16}, "at least 32 x 32"),
        ({"hard_fraction": 1.5}, "hard_fraction is 1.5"),
        ({"seed": -1}, "must not be negative"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        ShapesDataset(**arguments)


def test_an_index_outside_is_an_error():
    with pytest.raises(IndexError):
        ShapesDataset(length=2)[2]
