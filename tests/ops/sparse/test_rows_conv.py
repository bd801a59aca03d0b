"""Every execution of the convolution at the positions of a mask, against a float64 reference.

Inputs are read everywhere: a mask selects outputs only, unlike submanifold convolution, which drops inactive inputs.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dyndet.ops.sparse import Impl, Plan, RowLayout, conv, conv_work, make_plans, whole_plan

LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values behind other strides."""
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "sliced":
        return torch.stack([x, x.neg()], -1)[..., 0]
    if layout == "expanded":
        return x[:1].expand(x.shape)
    return x


def masked_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, mask: Tensor, impl: Impl = "auto",
    expected: float | None = None,
) -> Tensor:  # fmt: skip
    """(B, C, H, W) -> (B, O, H, W), zero where the mask is not set."""
    layout = RowLayout.of([x])
    (plan,) = make_plans(layout.flat([mask])[0], layout, expected=expected, impl=impl)
    rows = conv(layout.rows([x]), weight, bias, source=whole_plan(layout), target=plan, impl=impl)
    nothing = plan.inverse == plan.capacity
    placed = rows if plan.whole else torch.where(nothing[:, None], rows.new_zeros(()), rows[plan.inverse.long()])
    return layout.maps(placed)[0]


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 65), st.integers(1, 65), st.floats(0, 1), st.booleans(),
    st.sampled_from(["dense", "gather", "auto"]), st.sampled_from(LAYOUTS), st.integers(0, 999),
)  # fmt: skip
def test_against_float64(
    batch: int, height: int, width: int, density: float, biased: bool, impl: Impl, layout: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = laid_out(torch.randn(batch, 3, height, width, generator=generator), layout)
    weight = torch.randn(4, 3, 3, 3, generator=generator)
    bias = torch.randn(4, generator=generator) if biased else None
    mask = torch.rand(batch, 1, height, width, generator=generator) < density
    actual = masked_conv(x, weight, bias, mask=mask, impl=impl)
    exact = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1) * mask
    assert torch.allclose(actual.double(), exact, atol=1e-4)
    assert not actual[~mask.expand_as(actual)].any()


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("impl", ["dense", "gather", "triton"])
def test_every_execution_and_type(dtype: torch.dtype, error: float, impl: Impl) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 16, 7, 9).to(dtype), torch.randn(16, 16, 3, 3).to(dtype)
    mask = torch.rand(2, 1, 7, 9) < 0.4
    actual = masked_conv(x, weight, mask=mask, impl=impl).double()
    exact = F.conv2d(x.double(), weight.double(), padding=1) * mask
    assert (actual - exact).norm() / exact.norm() < error


def test_inactive_inputs_are_read() -> None:
    x = torch.ones(1, 1, 3, 3)
    mask = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    mask[0, 0, 1, 1] = True
    for impl in ("dense", "gather"):
        out = masked_conv(x, torch.ones(1, 1, 3, 3), mask=mask, impl=impl)  # type: ignore[arg-type]
        assert out[0, 0, 1, 1] == 9


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_gradients_of_gather_equal_those_of_dense(density: float) -> None:
    torch.manual_seed(0)
    mask = torch.rand(2, 1, 6, 5) < density
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


@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_auto_compiles_into_one_graph(density: float) -> None:
    torch.manual_seed(0)
    mask = torch.rand(2, 1, 6, 5) < density

    def run(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        return masked_conv(x, weight, mask=mask)

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        x, weight = torch.randn(2, 3, 6, 5, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
        y = function(x, weight, mask)
        y.square().sum().backward()
        results.append((y, x.grad, weight.grad))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def work(mask: Tensor, impl: Impl = "auto") -> tuple[float, float]:
    """Multiply-adds asked for and executed of a convolution with a weight of 9 values."""
    layout = RowLayout.of([mask])
    (plan,) = make_plans(layout.flat([mask])[0], layout, impl=impl)
    item = conv_work(torch.zeros(1, 1), torch.zeros(1, 1, 3, 3), target=plan, impl=impl)
    return float(item.asked()), float(item.executed())


def test_auto_takes_the_dense_way_at_high_density() -> None:
    mask = torch.zeros(1, 1, 10, 10, dtype=torch.bool)
    mask[..., :2, :] = True
    assert work(mask) == (180, 180)
    mask[..., :9, :] = True
    assert work(mask) == (810, 900)
    assert work(torch.ones_like(mask)) == (900, 900)


@pytest.mark.parametrize("impl", ["auto", "dense", "gather"])
@pytest.mark.parametrize("density", [None, 0.0, 1.0])
def test_an_expected_density_changes_no_result(impl: Impl, density: float | None) -> None:
    torch.manual_seed(0)
    x, weight, mask = torch.randn(2, 3, 6, 5), torch.randn(4, 3, 3, 3), torch.rand(2, 1, 6, 5) < 0.5
    out = masked_conv(x, weight, mask=mask, expected=density, impl=impl)
    assert torch.allclose(out, F.conv2d(x, weight, padding=1) * mask, atol=1e-5)


def test_what_is_masked_is_zero_whatever_lies_there() -> None:
    x, mask = torch.zeros(1, 1, 5, 5), torch.ones(1, 1, 5, 5, dtype=torch.bool)
    x[..., 0, 0], mask[..., :2, :2] = float("inf"), False
    for impl in ("dense", "gather"):
        assert not masked_conv(x, torch.ones(1, 1, 3, 3), mask=mask, impl=impl).any()  # type: ignore[arg-type]


def test_batches_may_be_empty() -> None:
    weight = torch.zeros(1, 3, 3, 3)
    out = masked_conv(torch.zeros(0, 3, 4, 4), weight, mask=torch.zeros(0, 1, 4, 4, dtype=torch.bool))
    assert out.shape == (0, 1, 4, 4)


@pytest.mark.parametrize("impl", ["dense", "gather"])
@pytest.mark.parametrize("open_levels", [(), (0,), (1,), (0, 2)])
def test_levels_without_rows(impl: Impl, open_levels: tuple[int, ...]) -> None:
    """From the map and from rows to rows, with gradients, in float64."""
    torch.manual_seed(0)
    layout = RowLayout(((5, 4), (3, 2), (2, 2)), 2, torch.device("cpu"))
    open_gates = torch.zeros(layout.positions)
    for level in open_levels:
        start, stop = layout.levels[level]
        open_gates[start:stop] = (torch.rand(stop - start) < 0.6).float()
    inner, outer = make_plans(open_gates, layout, reaches=(1, 0))
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)

    def dense(rows: Tensor, plan: Plan) -> Tensor:
        maps = [F.conv2d(x, weight, bias, padding=1) for x in layout.maps(rows)]
        return layout.rows(maps)[plan.positions.long()]

    for source in (whole_plan(layout), inner):
        x = torch.randn(source.capacity + 1, 3, dtype=torch.float64)
        x[-1] = 0
        x.requires_grad_()
        spread = x.new_zeros(layout.positions + 1, 3).index_copy(0, source.positions.long(), x[:-1])
        found = conv(x, weight, bias, source=source, target=outer, impl=impl)[:-1]
        pairs = [(found, dense(spread, outer))]
        slope = torch.linspace(-1, 1, found.numel(), dtype=x.dtype).view(found.shape)
        pairs += zip(*(torch.autograd.grad(y, (x, weight, bias), slope) for y in pairs[0]), strict=True)
        for a, b in pairs:
            assert torch.allclose(a, b, atol=1e-12)
