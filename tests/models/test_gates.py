"""Gate activations and gate convolutions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dyndet.models.heads.gates import GateConv, RestrictedTanh, Sigmoid, Softmax, gate_logits, restricted_tanh
from dyndet.ops.sparse import RowLayout

TABLE = [
    (0.0, 1.0, 2.6467),
    (0.5, 0.53788, 2.9555),
    (1.0, 0.23841, 3.3616),
    (1.5, 0.09485, 3.8221),
    (2.0, 0.03597, 4.3067),
]


@pytest.mark.parametrize(("tau", "slope", "bias"), TABLE)
def test_table_of_the_restricted_tanh(tau: float, slope: float, bias: float) -> None:
    v = torch.tensor([1e-6], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(restricted_tanh(v, tau).sum(), v)
    assert gradient.item() == pytest.approx(slope, abs=2e-5)
    assert RestrictedTanh(tau).logit(0.99) == pytest.approx(bias, abs=5e-5)
    at_tau = restricted_tanh(torch.tensor(tau, dtype=torch.float64), tau).item()
    assert at_tau == pytest.approx(math.tanh(tau) / (1 + math.tanh(tau)), abs=1e-12)


@given(st.floats(0, 3), st.floats(-20, 20))
def test_restricted_tanh_against_its_formula(tau: float, v: float) -> None:
    expected = max(0.0, (math.tanh(v - tau) + math.tanh(tau)) / (1 + math.tanh(tau)))
    value = restricted_tanh(torch.tensor(v, dtype=torch.float64), tau).item()
    assert value == pytest.approx(expected, abs=1e-12)
    assert 0 <= value <= 1
    assert v > 0 or value == 0


def test_no_gradient_where_the_gate_is_closed() -> None:
    v = torch.tensor([-3.0, -0.1, 0.5], requires_grad=True)
    restricted_tanh(v).sum().backward()
    assert v.grad is not None
    assert v.grad[:2].tolist() == [0, 0]
    assert v.grad[2] > 0


@pytest.mark.parametrize("activation", [RestrictedTanh(1.5), RestrictedTanh(0.0), Sigmoid()])
@pytest.mark.parametrize("openness", [0.5, 0.9, 0.99])
def test_gates_start_at_the_wanted_openness(activation: torch.nn.Module, openness: float) -> None:
    bias = activation.logit(openness)  # type: ignore[operator]
    layout = RowLayout.of([torch.zeros(1, 8, 4, 4)])
    gate = activation(GateConv(8, bias=bias)(torch.zeros(17, 8), layout), layout)
    assert torch.allclose(gate, torch.tensor(openness), atol=1e-5)


def test_softmax_axes() -> None:
    layout = RowLayout.of([torch.zeros(2, 1, 4, 5), torch.zeros(2, 1, 2, 3)])
    logits = torch.randn(3, layout.positions)
    paths, positions = Softmax("paths"), Softmax("positions")
    assert paths.joint and not positions.joint
    assert torch.allclose(paths(logits, layout).sum(0), torch.ones(layout.positions))
    for gate in positions(logits, layout):
        for level in layout.unflat(gate):
            assert torch.allclose(level.sum((1, 2, 3)), torch.ones(2))
    assert (paths(logits, layout) > 0).all()
    with pytest.raises(ValueError, match="axis"):
        Softmax("levels")  # type: ignore[arg-type]


def test_coarse_gates_average_over_valid_positions_only() -> None:
    gate = GateConv(1, kernel=1, coarse=True)
    torch.nn.init.ones_(gate.conv.weight)
    features = torch.tensor([[[[1.0, 3.0, 100.0]]]])
    layout = RowLayout.of([features])
    rows = layout.rows([features])
    assert gate(rows, layout, torch.tensor([True, True, False])).tolist() == [2.0, 2.0, 2.0]
    assert gate(rows, layout)[0].item() == pytest.approx(104 / 3)


@pytest.mark.parametrize("kernel", [1, 3])
def test_logits_of_several_gates_are_their_convolutions(kernel: int) -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, 6, 5, 4), torch.randn(2, 6, 3, 1)]
    layout = RowLayout.of(maps)
    gates = [GateConv(6, kernel=kernel, bias=bias) for bias in (0.5, -1.0)]
    logits = gate_logits(gates, layout.rows(maps), layout)
    for gate, flat in zip(gates, logits, strict=True):
        for x, level in zip(maps, layout.unflat(flat), strict=True):
            assert torch.allclose(level, gate.conv(x), atol=1e-5)


def test_other_gate_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="gate_kernel"):
        GateConv(4, kernel=5)


def test_the_router_is_priced() -> None:
    assert GateConv(256, kernel=3).macs == 2304
    assert GateConv(256, kernel=1).macs == 256
