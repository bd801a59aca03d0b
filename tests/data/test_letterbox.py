from __future__ import annotations

from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dyndet.data.letterbox import Letterbox, rectangular_shape
from dyndet.errors import UserError
from dyndet.structures import Sample, Target

NONE = torch.Generator()


def sample(height: int, width: int, box: tuple[int, int, int, int]) -> Sample:
    x1, y1, x2, y2 = box
    masks = torch.zeros(1, height, width, dtype=torch.bool)
    masks[:, y1:y2, x1:x2] = True
    image = torch.where(masks, 255, 0).to(torch.uint8).repeat(3, 1, 1)
    target = Target(torch.tensor([box]).float(), torch.tensor([4]), torch.tensor([True]), masks, torch.tensor([7.0]))
    target.original_size = (height, width)
    return Sample(image, target)


def test_a_square_around_the_resized_image() -> None:
    result = Letterbox(80)(sample(21, 40, (10, 5, 30, 15)), NONE)  # doubled to 42 x 80: 19 rows above and below
    assert result.image.shape == (3, 80, 80)
    assert (result.image[:, :19] == 114).all() and (result.image[:, 61:] == 114).all()
    assert not (result.image[:, 19:61] == 114).any()
    assert result.target.boxes.tolist() == [[20, 29, 60, 49]]
    masks = result.target.masks
    assert masks is not None
    assert masks[0, 29:49, 20:60].all() and masks.sum() == 20 * 40
    assert result.target.crowd.all() and result.target.labels.tolist() == [4]
    assert result.target.original_size == (21, 40)


def test_the_odd_pixel_lies_at_the_bottom_and_right() -> None:
    for height in range(1, 12):
        border = 12 - height
        result = Letterbox(12)(sample(height, 12, (0, 0, 12, height)), NONE)
        assert result.target.boxes[0, 1] == round(border / 2 - 0.1)
        assert 12 - result.target.boxes[0, 3] == round(border / 2 + 0.1)
        turned = Letterbox(12)(sample(12, height, (0, 0, height, 12)), NONE)
        assert turned.target.boxes[0, 0] == round(border / 2 - 0.1)


def test_options() -> None:
    small = sample(21, 40, (0, 0, 40, 21))
    assert Letterbox(80, enlarge=False)(small, NONE).target.boxes.tolist() == [[20, 29, 60, 50]]
    assert Letterbox(80, centre=False)(small, NONE).target.boxes.tolist() == [[0, 0, 80, 42]]
    assert Letterbox(20, enlarge=False)(small, NONE).image.shape == (3, 20, 20)
    assert Letterbox(80, stride=32)(small, NONE).image.shape == (3, 64, 96)
    assert Letterbox(80, stride=32, fill=7)(small, NONE).image[:, :11].unique().tolist() == [7]
    whole = sample(64, 64, (0, 0, 64, 64))
    assert torch.equal(Letterbox(64)(whole, NONE).image, whole.image)


@pytest.mark.parametrize(
    ("image", "canvas"),
    [((480, 640), (512, 672)), ((427, 640), (448, 672)), ((1080, 1920), (384, 672)), ((640, 640), (672, 672))],
)
def test_published_canvases(image: tuple[int, int], canvas: tuple[int, int]) -> None:
    assert rectangular_shape([image], 640, 32) == canvas
    assert rectangular_shape([image[::-1]], 640, 32) == canvas[::-1]


def test_a_batch_shares_a_canvas() -> None:
    assert rectangular_shape([(480, 640), (427, 640), (1080, 1920)], 640, 32) == (512, 672)
    assert rectangular_shape([(480, 640), (640, 427)], 640, 32) == (672, 672)
    assert rectangular_shape([(720, 1280)], 1280, 64) == (768, 1344)  # 11.75 and 20.5 strides


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 1300), st.sampled_from([8, 32, 64]))
def test_canvases_hold_the_image_with_half_a_stride_to_spare(height: int, width: int, size: int, stride: int) -> None:
    for side, length in zip((height, width), rectangular_shape([(height, width)], size, stride), strict=True):
        share = side * size / max(height, width) / stride
        assert length % stride == 0
        assert length / stride in (ceil(share + 0.5 - 1e-9), ceil(share + 0.5 + 1e-9))
    # Nothing to spare: the least multiple of the stride.
    assert rectangular_shape([(height, height)], 8 * stride, stride, extra=0) == (8 * stride, 8 * stride)


@pytest.mark.parametrize("wrong", [{"size": 0}, {"size": 8, "stride": 0}, {"size": 8, "fill": 256}])
def test_wrong_arguments(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError):
        Letterbox(**wrong)  # pyright: ignore[reportArgumentType]
