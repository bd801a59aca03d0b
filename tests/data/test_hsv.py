from __future__ import annotations

import colorsys

import pytest
import torch

from dyndet.data.hsv import Hsv, scale_hsv
from dyndet.errors import UserError
from dyndet.structures import Sample, Target

COLOURS = torch.cat(
    [
        torch.cartesian_prod(*[torch.tensor([0, 1, 60, 128, 200, 254, 255])] * 3),
        torch.randint(0, 256, (300, 3), generator=torch.Generator().manual_seed(0)),
    ]
).to(torch.uint8)
IMAGE = COLOURS.T[:, :, None].contiguous()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_factors_of_one_change_nothing() -> None:
    assert torch.equal(scale_hsv(IMAGE, 1, 1, 1), IMAGE)


@pytest.mark.parametrize(
    "factors",
    [(1.015, 1, 1), (0.985, 1, 1), (1, 1.7, 1), (1, 0.3, 1), (1, 1, 1.4), (1, 1, 0.6), (1.9, 1.5, 1.3), (0.99, 0, 0)],
)
def test_colours_match_colorsys(factors: tuple[float, float, float]) -> None:
    result = scale_hsv(IMAGE, *factors)
    assert result.dtype == torch.uint8
    for before, after in zip(COLOURS.tolist(), result[:, :, 0].T.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(level / 255 for level in before))
        hue, saturation, value = hue * factors[0] % 1, min(saturation * factors[1], 1), min(value * factors[2], 1)
        expected = [255 * level for level in colorsys.hsv_to_rgb(hue, saturation, value)]
        assert after == pytest.approx(expected, abs=0.501)


def test_hue_is_an_angle_from_red() -> None:
    violet = torch.tensor([100, 0, 255], dtype=torch.uint8)[:, None, None]
    assert scale_hsv(violet, 1.4, 1, 1).flatten().tolist() == [255, 38, 0]  # 263.5 degrees to 368.9: past red


def test_drawn_factors() -> None:
    grey = Sample(torch.full((3, 1, 1), 100, dtype=torch.uint8), Target(*[torch.zeros(0)] * 3))
    levels = [int(Hsv(0, 0, 0.4)(grey, generator(seed)).image[0]) for seed in range(200)]
    assert 60 <= min(levels) < 64 and 136 < max(levels) <= 140
    green = Sample(torch.tensor([100, 200, 100], dtype=torch.uint8)[:, None, None], grey.target)
    rest = [int(Hsv(0, 0.7, 0)(green, generator(seed)).image[0]) for seed in range(200)]
    assert 30 <= min(rest) < 35 and 165 < max(rest) <= 170  # saturation 0.5 -> 0.15 .. 0.85
    hues = [Hsv(0.1, 0, 0)(green, generator(seed)).image.flatten().tolist() for seed in range(200)]
    assert max(red for red, _, _ in hues) == pytest.approx(120, abs=1)  # 120 -> 108 .. 132 degrees
    assert max(blue for _, _, blue in hues) == pytest.approx(120, abs=1)
    assert Hsv(0, 0, 0)(green, generator()) is green


def test_every_amount_has_its_own_draw() -> None:
    sample = Sample(IMAGE, Target(*[torch.zeros(0)] * 3))
    before = IMAGE.clone()
    results = {Hsv()(sample, generator(seed)).image.numpy().tobytes() for seed in (1, 1, 2, 3)}
    assert len(results) == 3
    assert torch.equal(sample.image, before)


@pytest.mark.parametrize("amounts", [(1.5, 0, 0), (0, -0.1, 0), (0, 0, 2)])
def test_wrong_arguments(amounts: tuple[float, float, float]) -> None:
    with pytest.raises(UserError, match=r"1 - x \.\. 1 \+ x"):
        Hsv(*amounts)
