"""Plans: which rows are computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dyndet.errors import UserError
from dyndet.ops.sparse import Plan, RowLayout, make_plans
from dyndet.ops.sparse.tables import segment

SHAPES = ((6, 5), (3, 3), (1, 2))


def masks(density: float, seed: int, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(batch, 1, *shape, generator=generator) < density for shape in SHAPES]


def check(plan: Plan, active: Tensor) -> None:
    """Every field against its definition."""
    count = int(active.sum())
    rows = active.nonzero().flatten()
    assert int(plan.offsets[-1]) == count == int(plan.count)
    assert plan.positions[:count].tolist() == rows.tolist()
    inverse = torch.full((len(active) + 1,), plan.capacity)
    inverse[rows] = torch.arange(count)
    assert plan.inverse.tolist() == inverse.tolist()
    per_segment = torch.zeros(plan.layout.segments).index_add(0, segment(plan.layout), active.float())
    assert plan.offsets.diff().tolist() == per_segment.int().tolist()


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(0, 99), st.booleans())
def test_exact_plans(density: float, seed: int, padded: bool) -> None:
    gates = masks(density, seed)
    layout = RowLayout.of(gates)
    valid = layout.flat(masks(0.7, seed + 1))[0] if padded else None
    inner, outer = make_plans(layout.flat(gates)[0], layout, valid=valid, reaches=(1, 0))
    near = layout.flat([F.max_pool2d(gate.float(), 3, 1, 1) > 0 for gate in gates])[0]
    own = layout.flat(gates)[0]
    for plan, active in ((inner, near), (outer, own)):
        active = active if valid is None else active & valid
        check(plan, active)
        assert plan.exact and plan.density == plan.capacity / layout.positions
        assert plan.whole == bool(active.all())


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_static_plans_have_room_for_everything(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    gates = masks(density, 0)
    layout = RowLayout.of(gates)
    active = layout.flat(gates)[0]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    (plan,) = make_plans(active, layout, expected=0.25)
    check(plan, active)
    assert plan.capacity == layout.positions and not plan.exact and plan.density == 0.25
    assert (plan.positions[int(active.sum()) :] == layout.positions).all()


def test_plans_by_kernels_are_the_same() -> None:
    gates = masks(0.3, 3)
    layout = RowLayout.of(gates)
    near = layout.flat([F.max_pool2d(gate.float(), 3, 1, 1) > 0 for gate in gates])[0]
    for plan, active in zip(
        make_plans(layout.flat(gates)[0], layout, reaches=(1, 0), impl="triton"),
        (near, layout.flat(gates)[0]),
        strict=True,
    ):
        check(plan, active)


def test_kernels_that_cannot_run_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    layout = RowLayout(SHAPES, 1, torch.device("cpu"))
    with pytest.raises(UserError, match="impl=triton needs a CUDA device"):
        make_plans(torch.ones(layout.positions), layout, impl="triton")


@pytest.mark.parametrize("exact", [True, False])
def test_the_operator_as_torch_sees_it(exact: bool) -> None:
    gates = masks(0.3, 3)
    layout = RowLayout.of(gates)
    arguments = (layout.flat(gates)[0].float(), None, layout.sizes, [1, 0], exact, "torch")
    checks = ("test_schema", "test_autograd_registration") if exact else ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.dyndet.plan.default, arguments, test_utils=checks)
