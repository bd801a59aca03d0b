"""Every execution of the masked convolution against a float64 reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dyndet.ops import masked_conv


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 3, 5]), st.floats(0, 1),
    st.booleans(), st.sampled_from(["dense", "gather", "auto"]), st.integers(0, 999),
)  # fmt: skip
def test_against_float64(
    batch: int, height: int, width: int, kernel: int, density: float, biased: bool, impl: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, height, width, generator=generator)
    weight = torch.randn(4, 3, kernel, kernel, generator=generator)
    bias = torch.randn(4, generator=generator) if biased else None
    mask = torch.rand(batch, 1, height, width, generator=generator) < density
    with torch.no_grad():
        actual = masked_conv(x, weight, bias, mask=mask, impl=impl)  # type: ignore[arg-type]
    exact = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=kernel // 2) * mask
    assert torch.allclose(actual.double(), exact, atol=1e-4)
    assert not actual[~mask.expand_as(actual)].any()


def test_inactive_inputs_are_read() -> None:
    """Unlike submanifold convolution."""
    x = torch.ones(1, 1, 3, 3)
    mask = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    mask[0, 0, 1, 1] = True
    for impl in ("dense", "gather"):
        out = masked_conv(x, torch.ones(1, 1, 3, 3), mask=mask, impl=impl)  # type: ignore[arg-type]
        assert out[0, 0, 1, 1] == 9


def test_gradients_of_gather_equal_those_of_dense() -> None:
    torch.manual_seed(0)
    mask = torch.rand(2, 1, 6, 5) < 0.4
    gradients = []
    for impl in ("dense", "gather"):
        torch.manual_seed(1)
        x = torch.randn(2, 3, 6, 5, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
        masked_conv(x, weight, bias, mask=mask, impl=impl).square().sum().backward()  # type: ignore[arg-type]
        gradients.append((x.grad, weight.grad, bias.grad))
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b)


def test_gather_follows_autocast() -> None:
    x, weight, mask = torch.randn(1, 3, 4, 4), torch.randn(2, 3, 3, 3), torch.ones(1, 1, 4, 4, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert masked_conv(x, weight, mask=mask, impl="gather").dtype == torch.bfloat16


def test_wrong_arguments_are_named() -> None:
    x, mask = torch.zeros(1, 3, 4, 4), torch.ones(1, 1, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="odd"):
        masked_conv(x, torch.zeros(1, 3, 2, 2), mask=mask)
    with pytest.raises(ValueError, match="mask"):
        masked_conv(x, torch.zeros(1, 3, 3, 3), mask=mask[..., :2])
    with pytest.raises(ValueError, match="impl"):
        masked_conv(x, torch.zeros(1, 3, 3, 3), mask=mask, impl="cuda")  # type: ignore[arg-type]
