"""The two ways to compute a modulated deformable convolution agree."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import deform_conv2d

from dyndet.ops.deform_conv import modulated_deform_conv


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 2), st.sampled_from([0.0, 0.5, 3.0, 1e4]), st.integers(0, 99)
)
def test_against_torchvision(height: int, width: int, stride: int, reach: float, seed: int) -> None:
    """Values and all gradients, in float64, with taps that stay, wander and leave the map."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, columns = -(-height // stride), -(-width // stride)
    x, weight, bias = random(2, 3, height, width), random(4, 3, 3, 3), random(4)
    # Off the grid, where bilinear sampling has no derivative.
    offset = (reach * random(2, 18, rows, columns)).floor() + 0.25
    mask = random(2, 9, rows, columns).sigmoid()
    inputs = [tensor.requires_grad_() for tensor in (x, offset, mask, weight, bias)]
    ours = modulated_deform_conv(x, offset, mask, weight, bias, stride=stride)
    theirs = deform_conv2d(x, offset, weight, bias, stride=(stride, stride), padding=(1, 1), mask=mask)
    assert torch.allclose(ours, theirs, atol=1e-9)
    pull = random(*ours.shape)
    for mine, expected in zip(
        torch.autograd.grad(ours, inputs, pull), torch.autograd.grad(theirs, inputs, pull), strict=True
    ):
        assert torch.allclose(mine, expected, atol=1e-8)


def test_it_compiles_with_gradients() -> None:
    torch.manual_seed(0)
    x, offset, mask = torch.randn(1, 3, 5, 6), torch.randn(1, 18, 5, 6), torch.rand(1, 9, 5, 6)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    compiled = torch.compile(modulated_deform_conv, fullgraph=True, backend="aot_eager")
    have = torch.autograd.grad(compiled(x, offset, mask, weight).sum(), weight)[0]
    want = torch.autograd.grad(modulated_deform_conv(x, offset, mask, weight).sum(), weight)[0]
    assert torch.allclose(have, want, atol=1e-5)
