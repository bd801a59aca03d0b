"""Group normalisation over active positions against a loop in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dyndet.ops.masked_norm import masked_group_norm


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 8), st.integers(1, 8), st.floats(0, 1), st.integers(0, 999))
def test_against_a_loop(batch: int, height: int, width: int, density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 6, height, width, generator=generator) * 3 + 1
    mask = torch.rand(batch, 1, height, width, generator=generator) < density
    weight, bias = torch.randn(6, generator=generator), torch.randn(6, generator=generator)
    actual = masked_group_norm(x, 2, weight, bias, mask=mask)
    for image in range(batch):
        where = mask[image, 0]
        assert not actual[image][:, ~where].any()
        if not where.any():
            continue
        for group in range(2):
            channels = slice(3 * group, 3 * group + 3)
            values = x[image, channels][:, where].double()
            normal = (values - values.mean()) / (values.var(unbiased=False) + 1e-5).sqrt()
            expected = normal * weight[channels, None].double() + bias[channels, None].double()
            assert torch.allclose(actual[image, channels][:, where].double(), expected, atol=1e-3)


def test_full_mask_equals_group_norm() -> None:
    x, weight, bias = torch.randn(2, 8, 5, 7), torch.randn(8), torch.randn(8)
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    expected = F.group_norm(x, 4, weight, bias)
    assert torch.allclose(masked_group_norm(x, 4, weight, bias, mask=mask), expected, atol=1e-5)
    assert torch.equal(masked_group_norm(x, 4, weight, bias, mask=None), expected)


def test_a_large_mean_does_not_cancel() -> None:
    x = torch.randn(1, 4, 16, 16) + 1000
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    one, zero = torch.ones(4), torch.zeros(4)
    expected = F.group_norm(x.double(), 2, one.double(), zero.double())
    assert torch.allclose(masked_group_norm(x, 2, one, zero, mask=mask).double(), expected, atol=1e-3)
