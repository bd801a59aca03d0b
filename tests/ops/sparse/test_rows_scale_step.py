"""The scale step of a node, as the head takes it, against dense float64 maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rows_block import GROUPS, masked_norm
from torch import Tensor

from dyndet.models.heads.paths import ScalePath
from dyndet.ops.sparse import Impl, RowLayout, Stats, conv_work, exchange, make_plans, sending

CHANNELS = 4
Shapes = list[tuple[int, int]]


class Scene:
    """Rows, gates, paths and weights of one pyramid; `density` None opens one position."""

    def __init__(self, shapes: Shapes, density: float | None, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.layout = RowLayout(tuple(shapes), 2, torch.device("cpu"))
        size = self.layout.positions
        self.rows = torch.randn(size + 1, CHANNELS, generator=generator, dtype=torch.float64)
        self.rows[-1] = 0
        self.rows.requires_grad_()
        self.gates = []
        for _ in range(2):
            mark = torch.rand(size, generator=generator)
            opened = mark == mark.max() if density is None else mark < density
            gate = (torch.rand(size, generator=generator, dtype=torch.float64) + 0.1) * opened
            self.gates.append(gate.requires_grad_())
        torch.manual_seed(seed)
        self.paths = [ScalePath(CHANNELS, GROUPS).double() for _ in range(2)]
        for parameter in (parameter for path in self.paths for parameter in path.parameters()):
            torch.nn.init.normal_(parameter)
        self.weights = [torch.full((1,), value, dtype=torch.float64, requires_grad=True) for value in (0.8, 0.5)]
        self.leaves = [self.rows, *self.gates, *self.weights, *(x for path in self.paths for x in path.parameters())]

    def sparse(self, stats: Stats, impl: Impl) -> Tensor:
        sent = []
        for path, gate, step in zip(self.paths, self.gates, (1, -1), strict=True):
            (plan,) = make_plans(gate.detach(), self.layout, valid=sending(self.layout, step), impl=impl)
            sent.append(path.gated(self.rows, gate * self.weights[1], plan, stats=stats, impl=impl)[0])
        down, up = sent
        return exchange(self.rows, down, up, self.weights[0], self.layout)

    def dense(self, stats: Stats) -> Tensor:
        maps = self.layout.maps(self.rows)
        sums = [self.weights[0] * x for x in maps]
        for path, gate, step in zip(self.paths, self.gates, (1, -1), strict=True):
            for level, (x, share) in enumerate(zip(maps, self.layout.unflat(gate), strict=True)):
                if 0 <= level + step < len(maps):
                    sent = masked_norm(path.conv(x), path.norm.weight, path.norm.bias, share > 0, stats) * share
                    size = maps[level + step].shape[2:]
                    arrived = F.interpolate(sent, size=size, mode="bilinear", align_corners=True)
                    sums[level + step] = sums[level + step] + self.weights[1] * arrived
        return self.layout.rows(sums)


def results(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The output and all gradients."""
    slope = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    slope[-1] = 0  # the last row stands for zero, whatever its gradient
    grads = torch.autograd.grad((out * slope).sum(), leaves, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(x) if y is None else y for x, y in zip(leaves, grads, strict=True))]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=4),
    st.sampled_from([0.0, None, 0.3, 1.0]), st.sampled_from(["gather", "dense", "auto"]),
    st.sampled_from(["active", "position"]), st.integers(0, 99),
)  # fmt: skip
def test_results_and_gradients_against_dense_maps(
    shapes: Shapes, density: float | None, impl: Impl, stats: Stats, seed: int
) -> None:
    scene = Scene(shapes, density, seed)
    expected, actual = results(scene.dense(stats), scene.leaves), results(scene.sparse(stats, impl), scene.leaves)
    for a, b in zip(actual, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-9, rtol=1e-7)


def test_bfloat16_features() -> None:
    """What autocast makes of a head: features of half precision, norms and gates of float32."""
    scene = Scene([(6, 5), (3, 4)], 0.4, 0)
    expected = results(scene.sparse("active", "gather"), scene.leaves)
    scene.rows = scene.rows.detach().bfloat16().requires_grad_()
    leaves = [scene.rows, *scene.leaves[1:]]
    actual = results(scene.sparse("active", "gather"), leaves)
    assert actual[0].dtype == actual[1].dtype == torch.bfloat16
    for a, b in zip(actual, expected, strict=True):
        assert (a.double() - b).norm() <= 0.05 * b.norm()


@pytest.mark.parametrize("impl", ["gather", "dense", "auto"])
def test_levels_without_a_receiver_or_rows_are_not_computed(impl: Impl) -> None:
    layout = RowLayout(((6, 5), (3, 4), (2, 2)), 2, torch.device("cpu"))
    x, weight = torch.zeros(layout.positions + 1, CHANNELS), torch.zeros(CHANNELS, 1, 3, 3)
    each = CHANNELS * 9 * 2  # multiply-adds of a position, in two images
    everything = torch.ones(layout.positions)
    coarsest = torch.zeros(layout.positions)
    coarsest[layout.levels[2][0] :] = 1
    for gate, step, positions in (
        (everything, 1, 30 + 12), (everything, -1, 12 + 4), (coarsest, 1, 0), (coarsest, -1, 4),
    ):  # fmt: skip
        (plan,) = make_plans(gate, layout, valid=sending(layout, step))
        item = conv_work(x, weight, target=plan, impl=impl)
        assert float(item.asked()) == float(item.executed()) == each * positions
