from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dyndet.data.affine import RandomAffine, affine_matrix, shift, warp_boxes, warp_image, warp_target
from dyndet.errors import UserError
from dyndet.structures import Sample, Target


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def objects(*boxes: tuple[float, ...], masks: Tensor | None = None) -> Target:
    count = len(boxes)
    crowd = torch.arange(count) % 2 == 1
    return Target(torch.tensor(boxes).float().reshape(-1, 4), torch.arange(count), crowd, masks, torch.ones(count))


def rectangle(height: int, width: int, box: tuple[int, int, int, int], with_mask: bool = False) -> Sample:
    """A white rectangle on the grey that surrounds images."""
    x1, y1, x2, y2 = box
    inside = torch.zeros(1, height, width, dtype=torch.bool)
    inside[:, y1:y2, x1:x2] = True
    image = torch.where(inside, 255, 114).to(torch.uint8).repeat(3, 1, 1)
    return Sample(image, objects(box, masks=inside if with_mask else None))


def extent(inside: Tensor) -> Tensor:
    """(4,) xyxy around the True pixels of (H, W)."""
    points = inside.nonzero().flip(1)
    return torch.cat([points.amin(0), points.amax(0) + 1]).float()


def point(matrix: Tensor, x: float, y: float) -> list[float]:
    return (matrix @ torch.tensor([x, y, 1], dtype=torch.float64))[:2].tolist()


def test_matrices_in_closed_form() -> None:
    assert torch.equal(affine_matrix((30, 40), (30, 40)), torch.eye(3, dtype=torch.float64))
    doubled = affine_matrix((30, 40), (10, 20), scale=2, centre=(0.25, 0.6))
    assert point(doubled, 20, 15) == [5, 6]  # the centre goes where it is told
    assert point(doubled, 21, 15) == [7, 6]
    turned = affine_matrix((30, 40), (30, 40), degrees=90)
    assert point(turned, 30, 15) == pytest.approx([20, 25])  # right of the centre to below: clockwise
    sheared = affine_matrix((30, 40), (30, 40), shear=(45, 0))
    assert point(sheared, 20, 25) == pytest.approx([30, 25])


def test_drawn_amounts() -> None:
    source = generator()
    affine = RandomAffine(degrees=10, translate=0.2, scale=0.9, shear=0)
    draws = [affine.draw((200, 100), (50, 80), source) for _ in range(2000)]
    factors = torch.stack([torch.linalg.det(matrix[:2, :2]).sqrt() for matrix in draws])
    assert 0.1 <= factors.min() < 0.12 and 1.98 < factors.max() <= 2.0
    assert float(factors.mean()) == pytest.approx(1.05, abs=0.04)
    degrees = torch.rad2deg(torch.stack([torch.atan2(matrix[1, 0], matrix[0, 0]) for matrix in draws]))
    assert -10 <= degrees.min() < -9.8 and 9.8 < degrees.max() <= 10
    x, y = torch.tensor([point(matrix, 50, 100) for matrix in draws]).T
    assert 0.3 * 80 <= x.min() < 25 and 55 < x.max() <= 0.7 * 80
    assert 0.3 * 50 <= y.min() < 16 and 34 < y.max() <= 0.7 * 50
    assert torch.corrcoef(torch.stack([x, y, factors.float()])).triu(1).abs().max() < 0.1
    exact = RandomAffine(translate=0, scale=(1.5, 1.5)).draw((10, 10), (10, 10), source)
    assert torch.equal(exact, affine_matrix((10, 10), (10, 10), scale=1.5))


def bilinear(image: np.ndarray, matrix: np.ndarray, height: int, width: int, fill: float) -> np.ndarray:
    """Pixel by pixel in float64, from the definition."""
    padded = np.pad(image.astype(np.float64), ((0, 0), (1, 1), (1, 1)), constant_values=fill)
    result = np.full((3, height, width), float(fill))
    inverse = np.linalg.inv(matrix)
    for row in range(height):
        for column in range(width):
            x, y, _ = inverse @ (column + 0.5, row + 0.5, 1) + 0.5  # in pixels of the padded image, from centres
            left, top = int(np.floor(x)), int(np.floor(y))
            if 0 <= left < padded.shape[2] - 1 and 0 <= top < padded.shape[1] - 1:
                u, v = x - left, y - top
                a, b = padded[:, top, left : left + 2], padded[:, top + 1, left : left + 2]
                mixed = (1 - v) * a + v * b
                result[:, row, column] = (1 - u) * mixed[:, 0] + u * mixed[:, 1]
    return result


@pytest.mark.parametrize("seed", range(10))
def test_pixels_match_the_definition(seed: int) -> None:
    image = torch.randint(0, 256, (3, 13, 17), dtype=torch.uint8, generator=generator(seed))
    affine = RandomAffine(degrees=40, translate=0.1 + 0.1 * seed, scale=(0.5, 1 + seed), shear=20)
    matrix = affine.draw((13, 17), (15, 11), generator(seed))
    result = warp_image(image, matrix, (15, 11), fill=90)
    assert result.dtype == torch.uint8
    expected = bilinear(image.numpy(), matrix.numpy(), 15, 11, 90)
    assert np.abs(result.numpy() - expected).max() < 0.51


def test_whole_pixels_move_unchanged() -> None:
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8, generator=generator())
    assert torch.equal(warp_image(image, torch.eye(3, dtype=torch.float64), (20, 30)), image)
    moved = warp_image(image, shift(3, -2), (20, 30))
    assert torch.equal(moved[:, :18, 3:], image[:, 2:, :27])
    assert (moved[:, 18:] == 114).all() and (moved[:, :, :3] == 114).all()
    for away in (shift(31, 0), shift(-31, 0), shift(0, 21), shift(0, -21), shift(500, -500)):
        assert (warp_image(image, away, (20, 30)) == 114).all()


@pytest.mark.parametrize("seed", range(20))
def test_a_rectangle_stays_in_its_box(seed: int) -> None:
    sample = rectangle(90, 120, (30, 25, 85, 60), with_mask=seed % 2 == 1)
    result = RandomAffine(size=100)(sample, generator(seed))
    assert result.image.shape == (3, 100, 100)
    assert len(result.target.boxes) == 1
    (box,) = result.target.boxes
    assert (extent(result.image[0] > 184) - box).abs().max() <= 1
    if result.target.masks is not None:
        assert torch.equal(extent(result.target.masks[0]), box)
        assert ((result.image[0] > 184) != result.target.masks[0]).float().mean() < 0.01


@pytest.mark.parametrize("seed", range(6))
def test_pixels_and_boxes_agree_to_a_fraction_of_a_pixel(seed: int) -> None:
    sample = rectangle(90, 120, (50, 40, 73, 51))
    result = RandomAffine(degrees=30, shear=10, translate=0.1, scale=(0.8, 1.5))(sample, generator(seed))
    weight = result.image[0].double() - 114
    x = ((torch.arange(120) + 0.5) * weight).sum() / weight.sum()
    y = ((torch.arange(90) + 0.5)[:, None] * weight).sum() / weight.sum()
    x1, y1, x2, y2 = result.target.boxes[0].tolist()  # around a parallelogram, so they share the centre
    assert [float(x), float(y)] == pytest.approx([(x1 + x2) / 2, (y1 + y2) / 2], abs=0.05)


@pytest.mark.parametrize("seed", range(4))
def test_masks_take_the_pixel_under_their_centre(seed: int) -> None:
    mask = torch.zeros(1, 40, 50, dtype=torch.bool)
    mask[:, 8:30, 12:40] = torch.rand(1, 22, 28, generator=generator(seed)) < 0.5
    target = objects((12, 8, 40, 30), masks=mask)
    matrix = RandomAffine(degrees=90, shear=15, translate=0.2, scale=0.4).draw((40, 50), (45, 35), generator(seed))
    result = warp_target(target, matrix, (45, 35)).masks
    assert result is not None
    inverse = np.linalg.inv(matrix.numpy())
    for row, column in np.ndindex(45, 35):
        x, y, _ = np.floor(inverse @ (column + 0.5, row + 0.5, 1)).astype(int)
        assert result[0, row, column] == (0 <= y < 40 and 0 <= x < 50 and bool(mask[0, y, x]))


def test_with_masks_boxes_are_those_of_what_is_seen() -> None:
    triangle = torch.ones(40, 40).tril().bool()[None]  # the half below the diagonal
    moved = warp_target(objects((0, 0, 40, 40), masks=triangle), shift(-30, 0), (40, 40))
    assert moved.boxes.tolist() == [[0, 30, 10, 40]]
    assert warp_target(objects((0, 0, 40, 40)), shift(-30, 0), (40, 40)).boxes.tolist() == [[0, 0, 10, 40]]


KEPT: list[tuple[tuple[float, ...], float, float, bool]] = [  # box, moved by, share for masks or boxes
    ((10, 10, 12, 40), 0, 0.1, False),  # 2 pixels wide
    ((10, 10, 13, 40), 0, 0.1, True),
    ((10, 10, 40, 12), 0, 0.1, False),  # 2 pixels high
    ((10, 10, 13, 70), 0, 0.1, False),  # 20 : 1
    ((10, 10, 13, 69), 0, 0.1, True),
    ((0, 10, 100, 60), -90, 0.1, False),  # exactly 10 % left
    ((0, 10, 100, 60), -89, 0.1, True),
    ((0, 10, 100, 60), -90, 0.01, True),
    ((0, 10, 400, 60), -396, 0.01, False),  # exactly 1 % left
    ((0, 10, 400, 60), -395, 0.01, True),
    ((0, 10, 100, 60), -120, 0.1, False),  # gone
    ((0, 10, 100, 60), -120, 0.01, False),
]


@pytest.mark.parametrize(("box", "moved", "share", "kept"), KEPT)
def test_little_that_is_left_does_not_train(box: tuple[int, ...], moved: float, share: float, kept: bool) -> None:
    sample = rectangle(100, 450, (box[0], box[1], box[2], box[3]), with_mask=share == 0.01)
    assert len(warp_target(sample.target, shift(moved, 0), (100, 450)).boxes) == kept


def test_area_is_compared_at_the_new_scale() -> None:
    halved = affine_matrix((100, 100), (100, 100), scale=0.2, centre=(0.1, 0.1))
    assert warp_target(objects((0, 0, 100, 100)), halved, (100, 100)).boxes.tolist() == [[0, 0, 20, 20]]


def test_everything_of_an_object_travels_along() -> None:
    masks = torch.zeros(4, 50, 50, dtype=torch.bool)
    boxes = [(0, 0, 10, 10), (20, 20, 22, 22), (20, 20, 40, 40), (30, 5, 45, 25)]
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = True
    for with_masks in (True, False):
        target = objects(*boxes, masks=masks if with_masks else None)
        result = warp_target(target, shift(2, 1), (50, 50))
        assert result.labels.tolist() == [0, 2, 3] and result.crowd.tolist() == [False, False, True]
        assert result.boxes.tolist() == [[2, 1, 12, 11], [22, 21, 42, 41], [32, 6, 47, 26]]
        assert result.area is None and result.boxes.dtype == torch.float32
        assert with_masks == (result.masks is not None and result.masks.shape == (3, 50, 50))


def test_images_without_objects_pass() -> None:
    for masks in (None, torch.zeros(0, 20, 30, dtype=torch.bool)):
        result = RandomAffine(size=24)(
            Sample(torch.zeros(3, 20, 30, dtype=torch.uint8), objects(masks=masks)), generator()
        )
        assert result.target.boxes.shape == (0, 4)
        assert masks is None or (result.target.masks is not None and result.target.masks.shape == (0, 24, 24))


def test_corners_of_turned_boxes() -> None:
    turned = affine_matrix((20, 20), (20, 20), degrees=45)
    (box,) = warp_boxes(torch.tensor([[6.0, 6, 14, 14]]), turned).tolist()
    reach = 4 * 2**0.5
    assert box == pytest.approx([10 - reach, 10 - reach, 10 + reach, 10 + reach])


@pytest.mark.parametrize(
    "wrong",
    [{"scale": 1.0}, {"scale": (0, 1)}, {"scale": (2, 1)}, {"scale": (1, 2, 3)}, {"translate": -1}, {"degrees": -1},
     {"shear": 90}, {"fill": 300}, {"size": 0}],
)  # fmt: skip
def test_wrong_arguments(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        RandomAffine(**wrong)
