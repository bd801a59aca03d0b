from __future__ import annotations

import pytest
import torch

from dyndet.data.letterbox import Letterbox
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


def test_fill_and_nothing_to_fill() -> None:
    small = sample(21, 40, (0, 0, 40, 21))
    assert Letterbox(80, fill=7)(small, NONE).image[:, :19].unique().tolist() == [7]
    assert Letterbox(20)(small, NONE).image.shape == (3, 20, 20)
    whole = sample(64, 64, (0, 0, 64, 64))
    assert torch.equal(Letterbox(64)(whole, NONE).image, whole.image)


@pytest.mark.parametrize("wrong", [{"size": 0}, {"size": 8, "fill": 256}])
def test_wrong_arguments(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError):
        Letterbox(**wrong)  # pyright: ignore[reportArgumentType]
