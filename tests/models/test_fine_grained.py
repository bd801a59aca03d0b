"""The fine-grained head: routing, sparse execution, budgets, and how it starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dyndet.models.budget import Budget
from dyndet.models.heads.fine_grained import FineGrainedHead
from dyndet.models.heads.fixed import FixedHead
from dyndet.models.heads.gates import RestrictedTanh, Softmax
from dyndet.ops.sparse import received
from routing_views import PathGate, routing_of, views

SHAPES = [(12, 16), (6, 8), (3, 4)]


def pyramid(channels: int = 8, batch: int = 2, seed: int = 0, shapes: list[tuple[int, int]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, channels, *shape, generator=generator) for shape in shapes]


def head(**kwargs: Any) -> FineGrainedHead:
    torch.manual_seed(0)
    return FineGrainedHead(8, **{"depth": 2, "norm_groups": 2, **kwargs})


def scattered(**kwargs: Any) -> FineGrainedHead:
    """A head whose gates are open at some positions, and whose scale paths matter."""
    module = head(**kwargs)
    for node in [*module.cls, *module.reg]:
        node.scale_weight.data.fill_(0.5)
        for gate in node.gates.values():
            gate.conv.weight.data.normal_(std=0.5)
            gate.conv.bias.data.fill_(-0.3)
    return module


def test_at_the_start_gates_are_open_and_scale_paths_have_no_effect() -> None:
    module = head().train()
    features = pyramid()
    output = module(features)
    assert output.routing is not None
    assert output.routing.used_ratio().tolist() == [1.0, 1.0]
    assert (output.routing.soft() / output.routing.full()).mean().item() == pytest.approx(0.99, abs=0.005)
    sum(x.square().sum() for x in output.cls + output.reg).backward()  # type: ignore[union-attr]
    node = module.cls[0]
    assert node.scale_weight.grad is not None and node.scale_weight.grad.abs() > 0
    for parameter in [*node.up.parameters(), *node.down.parameters(), *node.gates["up"].parameters()]:
        assert parameter.grad is not None and not parameter.grad.any()
    assert node.gates["depth"].conv.bias.grad.abs() > 0


def test_closed_gates_pass_the_identity_through() -> None:
    module = head().eval()
    for node in [*module.cls, *module.reg]:
        for gate in node.gates.values():
            gate.conv.weight.data.zero_()
            gate.conv.bias.data.fill_(-1)
    features = pyramid()
    with torch.no_grad():
        output = module(features)
    for x, y in zip(features, output.cls, strict=True):
        assert torch.equal(y, x.relu())
    assert output.routing.used().tolist() == [0, 0]


@pytest.mark.parametrize("norm_stats", ["active", "position", "published"])
@pytest.mark.parametrize("openness", ["open", "scattered"])
@pytest.mark.parametrize("impl", ["gather", "triton"])
def test_sparse_equals_dense_execution(norm_stats: str, openness: str, impl: str) -> None:
    make = scattered if openness == "scattered" else head
    depth, shapes = (1, SHAPES[1:]) if impl == "triton" else (2, SHAPES)  # interpreted kernels take their time
    dense, sparse = (make(norm_stats=norm_stats, impl=how, depth=depth).eval() for how in ("dense", impl))
    sparse.load_state_dict(dense.state_dict())
    with torch.no_grad():
        expected, actual = dense(pyramid(shapes=shapes)), sparse(pyramid(shapes=shapes))
    if openness == "scattered":
        assert 0.1 < expected.routing.used_ratio().mean() < 0.9
    for a, b in zip(expected.cls + expected.reg, actual.cls + actual.reg, strict=True):
        assert (a - b).norm() <= 2e-6 * a.norm()


@pytest.mark.parametrize("norm_stats", ["active", "position"])
@pytest.mark.parametrize("impl", ["gather", "triton"])
def test_sparse_training_has_the_gradients_of_the_dense_one(norm_stats: str, impl: str) -> None:
    gradients, shapes = [], SHAPES[1:] if impl == "triton" else SHAPES
    for how in ("dense", impl):
        module = scattered(norm_stats=norm_stats, impl=how, depth=1).train()
        features = [x.requires_grad_() for x in pyramid(shapes=shapes)]
        output = module(features)
        loss = sum(x.square().sum() for x in output.cls + output.reg)
        (loss + 1e3 * Budget(0.1)(output.routing)).backward()  # type: ignore[union-attr]
        gradients.append([x.grad for x in features] + [p.grad for p in module.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm().clamp(min=1e-3)


def test_work_counts_what_was_run() -> None:
    """Gathered rows are exact and dense ones are all; interpreted kernels round up to tiles."""
    features = pyramid()
    positions = sum(x.shape[0] * x.shape[2] * x.shape[3] for x in features)
    for impl in ("gather", "dense", "triton"):
        with torch.no_grad():
            routing = scattered(impl=impl, depth=1).eval()(features).routing
        depth = [gate for gate in views(routing) if gate.path == "depth"]
        inner, outer = (sum(int(gate.mask(reach).sum()) for gate in depth) for reach in (1, 0))
        convs = [work for work in routing.work if work.macs == 9 * 8 * 8]
        assert len(convs) == 4
        if impl == "dense":
            assert [work.executed() for work in convs] == [positions * 576.0] * 4
        else:
            assert sum(int(work.rows) for work in convs) == inner + outer
            exact = (inner + outer) * 576.0
            executed = sum(float(work.executed()) for work in convs)
            assert executed == exact if impl == "gather" else executed >= exact
        assert float(routing.executed()) >= sum(float(work.executed()) for work in convs)


def test_all_open_masked_execution_equals_the_dense_block() -> None:
    active, whole = head(norm_stats="active").eval(), head(norm_stats="dense").eval()
    whole.load_state_dict(active.state_dict())
    with torch.no_grad():
        for a, b in zip(active(pyramid()).cls, whole(pyramid()).cls, strict=True):
            assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("norm_stats", ["active", "position", "dense"])
def test_training_and_inference_are_one_function(norm_stats: str) -> None:
    module = scattered(norm_stats=norm_stats)
    with torch.no_grad():
        training, inference = module.train()(pyramid()), module.eval()(pyramid())
    for a, b in zip(training.cls + training.reg, inference.cls + inference.reg, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_published_mode_differs_between_training_and_inference() -> None:
    module = scattered(norm_stats="published")
    with torch.no_grad():
        training, inference = module.train()(pyramid()), module.eval()(pyramid())
    assert not torch.allclose(training.cls[0], inference.cls[0], atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99))
def test_costs_against_a_loop(height: int, width: int, density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gate = torch.rand(1, 1, height, width, generator=generator)
    gate = gate * (torch.rand(1, 1, height, width, generator=generator) < density)
    costs = head().cls[0].depth.costs()
    routing = routing_of([PathGate("n", "depth", 0, gate, costs)])
    soft = used = 0.0
    for i in range(height):
        for j in range(width):
            near = gate[0, 0, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2].max().item()
            soft += costs[0].macs * near + costs[1].macs * gate[0, 0, i, j].item()
            used += costs[0].macs * (near > 0) + costs[1].macs * (gate[0, 0, i, j].item() > 0)
    assert routing.soft().item() == pytest.approx(soft, rel=1e-5)
    assert routing.used().item() == pytest.approx(used)
    assert routing.full().item() == 2 * costs[0].macs * height * width
    assert routing.soft().item() <= routing.used().item() <= routing.full().item()


@pytest.mark.parametrize("mode", ["on", "published"])
def test_budget_gradients(mode: str) -> None:
    module = scattered().train()
    for node in [*module.cls, *module.reg]:
        for gate in node.gates.values():
            gate.conv.bias.data.fill_(1.0)
    routing = module(pyramid()).routing
    loss = Budget(0.4, scale_gradient=mode)(routing)  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(0.4 * (routing.soft() / routing.full()).mean().item(), rel=1e-5)
    loss.backward()
    assert module.cls[-1].gates["depth"].conv.bias.grad.abs() > 0
    # A budget on the scale paths alone shows whether they have a price of their own.
    alone = routing_of([item for item in views(module(pyramid()).routing) if item.path != "depth"])
    price = Budget(1.0, scale_gradient=mode)(alone)  # type: ignore[arg-type]
    assert price.item() > 0
    assert price.requires_grad == (mode == "on")


def test_training_after_validation_in_inference_mode() -> None:
    """Index tables that validation built first serve training, whose tensors must be fit for autograd."""
    shapes = [(11, 13), (5, 6)]  # of no other test: the tables are cached
    module = scattered().train()
    with torch.inference_mode():
        module(pyramid(shapes=shapes))
    output = module(pyramid(shapes=shapes))
    sum(x.square().sum() for x in output.cls + output.reg).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in module.parameters())


def test_an_image_costs_the_same_alone_and_in_a_batch() -> None:
    module = scattered().eval()
    features = pyramid()
    with torch.no_grad():
        both = module(features).routing
        alone = module([x[1:] for x in features]).routing
        again = module(features).routing
    assert both.used()[1].item() == alone.used()[0].item()
    assert torch.equal(both.used(), again.used())  # nothing is carried from one pass to the next


def test_padding_is_closed_and_costs_nothing() -> None:
    module = head().eval()
    valid = [torch.ones(2, 1, *shape, dtype=torch.bool) for shape in SHAPES]
    for mask, (_, width) in zip(valid, SHAPES, strict=True):
        mask[1, :, :, width // 2 :] = False
    with torch.no_grad():
        routing = module(pyramid(), valid).routing
    full = routing.full()
    assert full[1].item() == full[0].item() / 2
    assert routing.used_ratio().tolist() == [1, 1]
    for gate in views(routing):
        assert not gate.gate[1, :, :, SHAPES[gate.level][1] // 2 :].any()
        assert gate.density().tolist() == [1, 1]
    with torch.no_grad():
        published = head(norm_stats="published").eval()(pyramid(), valid).routing
    assert published.full()[1].item() == full[0].item()


@pytest.mark.parametrize(
    ("gating", "gated"),
    [("none", set()), ("scale", {"up", "down"}), ("depth", {"depth"}), ("both", {"up", "down", "depth"})],
)
def test_ablated_paths_are_always_on(gating: str, gated: set[str]) -> None:
    module = scattered(gating=gating).eval()
    assert set(module.cls[0].gates) == gated
    with torch.no_grad():
        routing = module(pyramid()).routing
    for gate in views(routing):
        always = bool((gate.gate == 1).all())
        assert always == (gate.path not in gated)
        assert (gate.router_macs > 0) == (gate.path in gated)


def test_coarse_gates_are_constant_over_a_level() -> None:
    module = scattered(coarse=True).eval()
    with torch.no_grad():
        for gate in views(module(pyramid()).routing):
            flat = gate.gate.flatten(1)
            assert torch.equal(flat.amin(1), flat.amax(1))


def test_softmax_gates_share_one_at_every_position() -> None:
    module = scattered(activation=Softmax("paths")).eval()
    with torch.no_grad():
        routing = module(pyramid()).routing
    for level in range(len(SHAPES)):
        three = [gate.gate for gate in views(routing) if gate.node == "cls.0" and gate.level == level]
        assert len(three) == 3
        assert torch.allclose(sum(three), torch.ones(()), atol=1e-6)  # type: ignore[arg-type]
    assert routing.used_ratio().tolist() == [1, 1]


def test_softmax_over_positions_spends_nothing_on_padding() -> None:
    module = scattered(activation=Softmax("positions")).eval()
    valid = [torch.ones(2, 1, *shape, dtype=torch.bool) for shape in SHAPES]
    valid[0][1, :, :, 8:] = False
    with torch.no_grad():
        routing = module(pyramid(), valid).routing
    for gate in views(routing):
        assert torch.allclose(gate.gate.sum((1, 2, 3)), torch.ones(2), atol=1e-5)


def test_levels_exchange_with_their_neighbours_only() -> None:
    """In the fixed head, which is the published reference; `exchange` does the same with rows."""
    down = [torch.full((1, 1, 8 >> level, 8 >> level), 10.0**level) for level in range(3)]
    up = [2 * x for x in down]
    arrived = received(down, up)
    assert [float(x.mean()) for x in arrived] == [20, 1 + 200, 10]
    assert [tuple(x.shape[2:]) for x in arrived] == [(8, 8), (4, 4), (2, 2)]
    assert (received(down[:1], up[:1])[0] == 0).all()


@pytest.mark.parametrize("make", [FixedHead, FineGrainedHead])
def test_on_a_single_level_every_weight_has_a_gradient(make: Callable[..., torch.nn.Module]) -> None:
    """What is sent has no receiver, but processes wait for its gradient."""
    head = make(8, depth=1, norm_groups=2)
    output = head([torch.randn(1, 8, 5, 6)])
    sum(x.sum() for x in (*output.cls, *output.reg)).backward()
    missing = [name for name, weight in head.named_parameters() if weight.grad is None]
    assert missing == []


def test_odd_sizes_and_a_single_level() -> None:
    for shapes in ([(13, 21), (7, 11)], [(1, 1)], [(5, 3), (3, 2), (2, 1), (1, 1), (1, 1)]):
        module = scattered().eval()
        with torch.no_grad():
            output = module(pyramid(shapes=shapes))
        assert [tuple(x.shape[2:]) for x in output.cls] == shapes


def test_gradients_reach_every_parameter_of_both_heads() -> None:
    torch.manual_seed(0)
    for module in (scattered().train(), FixedHead(8, depth=2, norm_groups=2)):
        output = module(pyramid())
        sum(x.square().sum() for x in output.cls + output.reg).backward()  # type: ignore[union-attr]
        assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_wrong_arguments_are_named() -> None:
    for key, value in (
        ("norm_stats", "all"),
        ("gating", "all"),
        ("cost_table", "x"),
        ("impl", "cuda"),
        ("openness", 1.0),
    ):
        with pytest.raises(ValueError, match=key):
            head(**{key: value})
    with pytest.raises(ValueError, match="tau"):
        RestrictedTanh(-1)
