"""The operators in a row, as a depth block takes them, against a dense float64 reference on maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dyndet.ops.sparse import (
    Impl,
    Norm,
    RowLayout,
    Stats,
    conv,
    group_norm,
    make_plans,
    scatter_add,
    whole_plan,
)

GROUPS = 2


def masked_norm(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, stats: Stats) -> Tensor:
    """GroupNorm over the active positions of a map, or at each position."""
    groups = x.unflatten(1, (GROUPS, -1))
    if stats == "position":
        mean, variance = groups.mean(2, keepdim=True), groups.var(2, unbiased=False, keepdim=True)
    else:
        share = mask.unsqueeze(1).to(x.dtype)
        count = (share.sum((2, 3, 4), keepdim=True) * groups.shape[2]).clamp(min=1)
        mean = (groups * share).sum((2, 3, 4), keepdim=True) / count
        variance = ((groups - mean).square() * share).sum((2, 3, 4), keepdim=True) / count
    normal = ((groups - mean) * (variance + 1e-5).rsqrt()).flatten(1, 2)
    return (normal * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)) * mask


class Block:
    """Inputs and parameters of one block, and its result and gradients by either way."""

    def __init__(self, shapes: list[tuple[int, int]], batch: int, density: float, seed: int, channels: int = 8) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.maps = [random(batch, channels, *shape) for shape in shapes]
        gates = [torch.rand(batch, 1, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
        self.gates = [gate * (torch.rand(gate.shape, generator=generator) < density) for gate in gates]
        self.parameters = [random(10, channels, 3, 3), random(10), random(channels, 10, 3, 3)]
        self.parameters += [random(10), random(10), random(channels), random(channels)]

    def _leaves(self, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return tuple(  # type: ignore[return-value]
            [x.to(dtype).clone().requires_grad_() for x in group] for group in (self.maps, self.gates, self.parameters)
        )

    def dense(self, stats: Stats) -> list[Tensor]:
        maps, gates, parameters = self._leaves(torch.float64)
        w1, b1, w2, s1, t1, s2, t2 = parameters
        outputs = []
        for x, gate in zip(maps, gates, strict=True):
            inner, outer = F.max_pool2d(gate, 3, 1, 1) > 0, gate > 0
            hidden = masked_norm(F.conv2d(x, w1, b1, padding=1), s1, t1, inner, stats).relu()
            hidden = masked_norm(F.conv2d(hidden, w2, padding=1), s2, t2, outer, stats)
            outputs.append((x + gate * hidden).relu())
        return self._results(outputs, maps, gates, parameters)

    def sparse(self, stats: Stats, impl: Impl, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        maps, gates, parameters = self._leaves(dtype)
        w1, b1, w2, s1, t1, s2, t2 = parameters
        layout = RowLayout.of(maps)
        rows, gate = layout.rows(maps), layout.flat(gates)[0]
        inner, outer = make_plans(gate.detach(), layout, reaches=(1, 0), impl=impl)
        hidden = conv(rows, w1, b1, source=whole_plan(layout), target=inner, impl=impl)
        hidden = group_norm(hidden, Norm(s1, t1, GROUPS, stats=stats), plan=inner, relu=True, impl=impl)
        hidden = conv(hidden, w2, source=inner, target=outer, impl=impl)
        norm = Norm(s2, t2, GROUPS, stats=stats)
        out = scatter_add(hidden, norm, gate, residual=rows, plan=outer, relu=True, impl=impl)
        assert not out[-1].any()
        return self._results(layout.maps(out), maps, gates, parameters)

    @staticmethod
    def _results(outputs: list[Tensor], *leaves: list[Tensor]) -> list[Tensor]:
        weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) for x in outputs]
        torch.stack([(x * weight).sum() for x, weight in zip(outputs, weights, strict=True)]).sum().backward()
        grads = [x.grad if x.grad is not None else torch.zeros_like(x) for group in leaves for x in group]
        return [*outputs, *grads]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3), st.integers(1, 3),
    st.sampled_from([0.0, 0.02, 0.2, 0.6, 1.0]), st.sampled_from(["gather", "dense", "auto"]),
    st.sampled_from(["active", "position"]), st.integers(0, 999),
)  # fmt: skip
def test_results_and_gradients_against_dense_maps(
    shapes: list[tuple[int, int]], batch: int, density: float, impl: Impl, stats: Stats, seed: int
) -> None:
    block = Block(shapes, batch, density, seed)
    for expected, actual in zip(block.dense(stats), block.sparse(stats, impl), strict=True):
        assert torch.allclose(expected, actual, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("stats", ["active", "position"])
@pytest.mark.parametrize("impl", ["gather", "dense", "triton"])
@pytest.mark.parametrize("density", [0.0, 0.3])
def test_single_precision(stats: Stats, impl: Impl, density: float) -> None:
    """The interpreter runs what a GPU would. Empty masks must leave finite gradients."""
    block = Block([(6, 5), (3, 4)], 2, density, 0)
    for expected, actual in zip(block.dense(stats), block.sparse(stats, impl, torch.float32), strict=True):
        assert (expected - actual).norm() <= 1e-5 * expected.norm().clamp(min=1e-2)


def test_one_level_may_be_empty() -> None:
    block = Block([(6, 5), (3, 4), (2, 2)], 1, 0.5, 1)
    for empty in (0, 1, 2):
        block.gates[empty] = torch.zeros_like(block.gates[empty])
        for expected, actual in zip(block.dense("active"), block.sparse("active", "gather"), strict=True):
            assert torch.allclose(expected, actual, atol=1e-9)


@pytest.mark.parametrize("impl", ["gather", "triton"])
def test_undefined_rows_are_never_read(impl: Impl, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows beyond the count of a plan of full capacity hold NaN."""
    torch.manual_seed(0)
    layout = RowLayout(((5, 6),), 1, torch.device("cpu"))
    gate = (torch.rand(layout.positions) < 0.3).float()
    exact = make_plans(gate, layout, reaches=(1, 0), impl="gather")
    with monkeypatch.context() as compiling:
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        roomy = make_plans(gate, layout, reaches=(1, 0), impl=impl)
    weight, scale, shift = torch.randn(4, 4, 3, 3), torch.randn(4), torch.randn(4)
    features = torch.randn(int(exact[0].count), 4)
    results = []
    for (inner, outer), how in ((exact, "gather"), (roomy, impl)):
        x = torch.full((inner.capacity + 1, 4), float("nan"))
        x[: len(features)] = features
        x[-1] = 0
        x.requires_grad_()
        y = conv(x, weight, source=inner, target=outer, impl=how)  # type: ignore[arg-type]
        out = scatter_add(y, Norm(scale, shift, 2), gate, plan=outer, impl=how)  # type: ignore[arg-type]
        (out * torch.arange(4)).sum().backward()
        assert x.grad is not None
        results.append((out, x.grad[: len(features)]))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
        assert b.isfinite().all()


def test_kernels_refuse_plans_without_room() -> None:
    layout = RowLayout(((5, 6),), 1, torch.device("cpu"))
    (plan,) = make_plans((torch.rand(30) < 0.3).float(), layout, impl="gather")
    x = torch.randn(plan.capacity + 1, 4)
    with pytest.raises(ValueError, match="same impl"):
        group_norm(x, Norm(torch.ones(4), torch.zeros(4), 2), plan=plan, impl="triton")
    with pytest.raises(ValueError, match="same impl"):
        conv(x, torch.zeros(4, 4, 3, 3), source=plan, target=plan, impl="triton")


def test_large_means_do_not_cancel() -> None:
    layout = RowLayout(((8, 8),), 1, torch.device("cpu"))
    x = torch.randn(65, 8) + 100
    x[-1] = 0
    expected = F.group_norm(x[:-1].t()[None].double(), 2)[0].t()
    for impl in ("gather", "triton"):
        y = group_norm(x, Norm(torch.ones(8), torch.zeros(8), 2), plan=whole_plan(layout), impl=impl)  # type: ignore[arg-type]
        assert torch.allclose(y[:-1].double(), expected, atol=1e-4)


def test_wrong_shapes_are_named() -> None:
    layout = RowLayout(((4, 4),), 1, torch.device("cpu"))
    whole = whole_plan(layout)
    with pytest.raises(ValueError, match="weight"):
        conv(torch.zeros(17, 4), torch.zeros(4, 3, 3, 3), source=whole, target=whole)
    with pytest.raises(ValueError, match="x has 16 rows"):
        conv(torch.zeros(16, 4), torch.zeros(4, 4, 3, 3), source=whole, target=whole)
