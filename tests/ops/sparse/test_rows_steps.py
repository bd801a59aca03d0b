"""The steps of a node in one piece, against the registered operators that they stand for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dyndet.ops.sparse import (
    ConvNorm,
    Impl,
    RowLayout,
    Stats,
    depth_rows,
    depth_step,
    make_plans,
    scale_rows,
    scale_step,
    scale_work,
    whole_plan,
)
from dyndet.ops.sparse.tables import sending

CHANNELS = 4
Shapes = list[tuple[int, int]]


def random_path(generator: torch.Generator, *, depthwise: bool) -> ConvNorm:
    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    weight = values(CHANNELS, 1 if depthwise else CHANNELS, 3, 3)
    return ConvNorm(weight, values(CHANNELS) if depthwise else None, values(CHANNELS), values(CHANNELS), 2, 1e-5)


class Scene:
    """Rows, gates and plans of one pyramid."""

    def __init__(self, shapes: Shapes, density: float, seed: int, whole: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.layout = RowLayout(tuple(shapes), 2, torch.device("cpu"))
        size, whole_map = self.layout.positions, whole_plan(self.layout)
        self.rows = torch.randn(size + 1, CHANNELS, generator=self.generator, dtype=torch.float64)
        self.rows[-1] = 0
        self.rows.requires_grad_()
        self.gates = [self.gate(density) for _ in range(3)]
        self.plans = [whole_map, whole_map, whole_map, whole_map]
        if not whole:
            down, up, depth = self.gates
            self.plans = [
                *make_plans(down, self.layout, valid=sending(self.layout, 1)),
                *make_plans(up, self.layout, valid=sending(self.layout, -1)),
                *make_plans(depth, self.layout, reaches=(1, 0)),
            ]

    def gate(self, density: float) -> Tensor:
        values = torch.rand(2, self.layout.positions, generator=self.generator, dtype=torch.float64)
        return (values[0] * (values[1] < density)).requires_grad_()

    def scale(self, stats: Stats, impl: Impl) -> tuple[Callable[[], Tensor], list[Tensor]]:
        paths = [random_path(self.generator, depthwise=True) for _ in range(2)]
        weights = [torch.full((1,), value, dtype=torch.float64, requires_grad=True) for value in (0.8, 0.5)]
        gates, plans = (self.gates[0], self.gates[1]), (self.plans[0], self.plans[1])
        leaves = [self.rows, *weights, *gates, *(x for path in paths for x in path[:4] if x is not None)]
        return lambda: scale_rows(self.rows, *weights, *paths, gates, plans, stats=stats, impl=impl), leaves

    def depth(self, stats: Stats, impl: Impl) -> tuple[Callable[[], Tensor], list[Tensor]]:
        paths = [random_path(self.generator, depthwise=False) for _ in range(2)]
        leaves = [self.rows, self.gates[2], *(x for path in paths for x in path[:4] if x is not None)]
        return lambda: depth_rows(self.rows, *paths, self.gates[2], *self.plans[2:], stats=stats, impl=impl), leaves


def results(step: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """The output and all gradients."""
    out = step()
    slope = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    slope[-1] = 0  # the last row stands for zero, whatever its gradient
    return [out.detach(), *torch.autograd.grad((out * slope).sum(), leaves)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=4),
    st.sampled_from([0.0, 0.03, 0.3, 1.0]), st.sampled_from(["gather", "dense", "auto"]),
    st.sampled_from(["active", "position"]), st.sampled_from(["scale", "depth"]), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_one_piece_equals_its_operators(
    monkeypatch: pytest.MonkeyPatch, shapes: Shapes, density: float, impl: Impl, stats: Stats, kind: str, whole: bool,
    seed: int,
) -> None:  # fmt: skip
    step, leaves = getattr(Scene(shapes, density, seed, whole), kind)(stats, impl)
    actual = results(step, leaves)
    with monkeypatch.context() as patch:
        for module in (scale_step, depth_step):
            patch.setattr(module, "in_one_piece", lambda *_: False)
        expected = results(step, leaves)
    for a, b in zip(actual, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("kind", ["scale", "depth"])
def test_bfloat16_features(kind: str) -> None:
    """What autocast makes of a head: features of half precision, norms and gates of float32."""
    scene = Scene([(6, 5), (3, 4)], 0.4, 0)
    step, leaves = getattr(scene, kind)("active", "gather")
    expected = results(step, leaves)
    scene.rows = scene.rows.detach().bfloat16().requires_grad_()
    actual = results(step, [scene.rows, *leaves[1:]])
    assert actual[0].dtype == actual[1].dtype == torch.bfloat16
    for a, b in zip(actual, expected, strict=True):
        assert (a.double() - b).norm() <= 0.05 * b.norm()


def test_levels_without_a_receiver_or_rows_are_not_computed() -> None:
    scene = Scene([(6, 5), (3, 4), (2, 2)], 1.0, 0)
    paths = [random_path(scene.generator, depthwise=True) for _ in range(2)]
    down, up = (float(item.executed()) for item in scale_work(scene.rows, *paths, (scene.plans[0], scene.plans[1])))  # type: ignore[misc]
    each = CHANNELS * 9 * 2  # multiply-adds of a position, in two images
    assert (down, up) == (each * (30 + 12), each * (12 + 4))
    coarsest = torch.zeros(scene.layout.positions)
    coarsest[scene.layout.levels[2][0] :] = 1
    nothing, few = (make_plans(coarsest, scene.layout, valid=sending(scene.layout, step))[0] for step in (1, -1))
    down, up = (float(item.executed()) for item in scale_work(scene.rows, *paths, (nothing, few)))  # type: ignore[misc]
    assert (down, up) == (0, each * 4)
    whole = whole_plan(scene.layout)
    for item, positions in zip(scale_work(scene.rows, *paths, (whole, whole)), (30 + 12, 12 + 4), strict=True):  # type: ignore[misc]
        assert float(item.asked()) == float(item.executed()) == each * positions
