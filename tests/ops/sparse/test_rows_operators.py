"""The operators as torch.library sees them: schemas, fake tensors, compilation, counting."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dyndet.models.heads.fine_grained import FineGrainedHead
from dyndet.models.heads.paths import DepthPath, ScalePath
from dyndet.ops.sparse import (
    Norm,
    Plan,
    RowLayout,
    conv,
    exchange,
    gate_logits,
    group_norm,
    make_plans,
    scatter_add,
    whole_plan,
)

operator_module = importlib.import_module("dyndet.ops.sparse.operator")
SHAPES = ((5, 4), (3, 2))


def setting(density: float = 0.4) -> dict[str, Any]:
    torch.manual_seed(0)
    layout = RowLayout(SHAPES, 2, torch.device("cpu"))
    gate = torch.rand(layout.positions) * (torch.rand(layout.positions) < density)
    (plan,) = make_plans(gate, layout)
    rows = layout.rows([torch.randn(2, 4, *shape) for shape in SHAPES]).requires_grad_()
    active = torch.randn(plan.capacity + 1, 4, requires_grad=True)
    scale, shift = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    return {
        "layout": layout, "gate": gate.requires_grad_(), "plan": plan, "rows": rows, "active": active,
        "scale": scale, "shift": shift, "weight": torch.randn(4, 4, 3, 3, requires_grad=True),
    }  # fmt: skip


@pytest.mark.parametrize("impl", ["dense", "gather", "triton"])
@pytest.mark.parametrize("relu", [True, False])
def test_results_share_no_memory(impl: str, relu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do they lie in an argument, forward and backward: compilers count on it."""
    calls: list[str] = []

    def watched(module: ModuleType) -> SimpleNamespace:
        def watch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                results = function(*arguments)
                given = {x.untyped_storage().data_ptr() for x in tree_leaves(arguments) if isinstance(x, Tensor)}
                made = [
                    x.untyped_storage().data_ptr() for x in tree_leaves(results) if isinstance(x, Tensor) and len(x)
                ]
                assert len({*made}) == len(made) and not given & {*made}, name
                calls.append(name)
                return results

            return run

        watching = {name: watch(name, getattr(module, name)) for name in names}
        return SimpleNamespace(**{**vars(module), **watching})

    names = [f"{name}{end}" for name in ("conv", "group_norm", "scatter_add") for end in ("", "_backward")]
    real = operator_module.backend
    monkeypatch.setattr(operator_module, "backend", lambda impl: watched(real(impl)))
    s = setting()
    layout, plan = (
        s["layout"],
        (s["plan"] if impl != "triton" else make_plans(s["gate"].detach(), s["layout"], impl="triton")[0]),
    )
    how: Any = {"impl": impl}
    for residual in (None, s["rows"]):
        x = conv(s["rows"], s["weight"], s["shift"], source=whole_plan(layout), target=plan, **how)
        x = group_norm(x, Norm(s["scale"], s["shift"], 2), plan=plan, relu=relu, **how)
        y = scatter_add(x, Norm(s["scale"], s["shift"], 2), s["gate"], residual=residual, plan=plan, relu=relu, **how)
        y.square().sum().backward()
    assert {*calls} == {*names}


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


@pytest.mark.parametrize("how", ["gather", "dense"])
@pytest.mark.parametrize("biased", [True, False])
def test_conv(how: str, biased: bool) -> None:
    s = setting()
    layout, whole, plan = s["layout"], whole_plan(s["layout"]), s["plan"]
    bias = s["shift"] if biased else None
    for source, target, x in ((whole, plan, s["rows"]), (plan, plan, s["active"])):
        plans = source.tensors, target.tensors, layout.sizes
        arguments = (x, s["weight"], bias, *plans, None, True, how)
        torch.library.opcheck(torch.ops.dyndet.conv.default, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("stats", ["active", "position"])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm(stats: str, relu: bool, dtype: torch.dtype) -> None:
    s = setting()
    tensors = (s[name].detach().to(dtype).requires_grad_() for name in ("active", "scale", "shift"))
    arguments = (*tensors, s["plan"].tensors, s["layout"].sizes, 2, 1e-5, stats, relu, "torch")
    torch.library.opcheck(torch.ops.dyndet.group_norm.default, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("stats", ["active", "position"])
@pytest.mark.parametrize("residual", [True, False])
def test_scatter_add(stats: str, residual: bool) -> None:
    s = setting()
    tensors = s["active"], s["scale"], s["shift"], s["gate"], s["rows"] if residual else None
    arguments = (*tensors, s["plan"].tensors, s["layout"].sizes, 2, 1e-5, stats, residual, "torch")
    torch.library.opcheck(torch.ops.dyndet.scatter_add.default, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("kernel", [1, 3])
def test_logits_against_torch(kernel: int) -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, 3, *shape, dtype=torch.float64) for shape in SHAPES]
    layout = RowLayout.of(maps)
    results = []
    for by_rows in (True, False):
        rows = layout.rows(maps).requires_grad_()
        weight = torch.linspace(-1, 1, 2 * 3 * kernel**2, dtype=torch.float64).view(2, 3, kernel, kernel)
        weight.requires_grad_()
        if by_rows:
            out = gate_logits(rows, weight, layout)
        else:
            levels = [F.conv2d(level, weight, padding=kernel // 2) for level in layout.maps(rows)]
            out = layout.flat(levels)
        (out.square() * torch.arange(out.shape[1])).sum().backward()
        results.append((out, rows.grad, weight.grad))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("shapes", [[(8, 6), (4, 3), (2, 2)], [(5, 5)], [(13, 21), (7, 11)]])
def test_exchange_against_torch(shapes: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    x, down, up = ([torch.randn(2, 3, *s, dtype=torch.float64) for s in shapes] for _ in range(3))
    layout = RowLayout.of(x)
    results = []
    for by_rows in (True, False):
        leaves = [layout.rows(value).requires_grad_() for value in (x, down, up)]
        own = torch.full((1,), 0.7, dtype=torch.float64, requires_grad=True)
        if by_rows:
            out = layout.maps(exchange(*leaves, own, layout))
        else:
            a, b, c = (layout.maps(value) for value in leaves)
            out = []
            for level, own_map in enumerate(a):
                s = own * own_map
                if level:
                    s = s + F.interpolate(b[level - 1], s.shape[2:], mode="bilinear", align_corners=True)
                if level + 1 < len(shapes):
                    s = s + F.interpolate(c[level + 1], s.shape[2:], mode="bilinear", align_corners=True)
                out.append(s)
        sum(value.square().sum() for value in out).backward()  # type: ignore[union-attr]
        zero = torch.zeros((), dtype=torch.float64)
        results.append([*out, *[v.grad if v.grad is not None else zero for v in (*leaves, own)]])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b.expand_as(a), atol=1e-12)


def block(
    rows: Tensor, gate: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, layout: RowLayout, impl: str
) -> Tensor:
    inner, outer = make_plans(gate.detach(), layout, reaches=(1, 0), impl=impl)  # type: ignore[arg-type]
    x = conv(rows, weight, source=whole_plan(layout), target=inner, impl=impl)  # type: ignore[arg-type]
    x = group_norm(x, Norm(scale, shift, 2), plan=inner, relu=True, impl=impl)  # type: ignore[arg-type]
    x = conv(x, weight, source=inner, target=outer, impl=impl)  # type: ignore[arg-type]
    norm = Norm(scale, shift, 2)
    return scatter_add(x, norm, gate, residual=rows, plan=outer, relu=True, impl=impl)  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", ["gather", "dense", "triton"])
def test_a_block_compiles_into_one_graph(impl: str) -> None:
    """With the kernels interpreted: to the compiler they are opaque."""
    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        s = setting()
        leaves = [s[name] for name in ("rows", "gate", "weight", "scale", "shift")]
        out = function(*leaves, s["layout"], impl)
        out.square().sum().backward()
        results.append([out, *[leaf.grad for leaf in leaves]])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_multiply_adds_are_counted_without_values() -> None:
    layout = RowLayout(SHAPES, 1, torch.device("meta"))
    with FlopCounterMode(display=False) as counter:
        block(
            torch.empty(layout.positions + 1, 4, device="meta"), torch.empty(layout.positions, device="meta"),
            *(torch.empty(*shape, device="meta") for shape in ((4, 4, 3, 3), (4,), (4,))), layout, "auto",
        )  # fmt: skip
    assert counter.get_total_flops() == 2 * 2 * layout.positions * 9 * 16


def test_what_export_made_serves_nobody_else() -> None:
    """Index tables are kept, but not those without values."""
    head = FineGrainedHead(4, depth=1, norm_groups=1).eval()

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, first: Tensor, second: Tensor) -> list[Tensor]:
            return self.head([first, second]).cls

    maps = torch.randn(1, 4, 9, 7), torch.randn(1, 4, 5, 4)  # sizes of no other test
    exported = torch.export.export(Both(), maps).module()
    for a, b in zip(exported(*maps), head(maps).cls, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_plans_of_a_compiled_region_serve_eager_steps() -> None:
    """They have room for every position, spare rows included."""
    torch.manual_seed(0)
    layout = RowLayout(SHAPES, 2, torch.device("cpu"))
    gate = torch.rand(layout.positions) * (torch.rand(layout.positions) < 0.3)
    rows = layout.rows([torch.randn(2, 4, *shape) for shape in SHAPES])
    deep, thin = DepthPath(4, 2), ScalePath(4, 2)

    def both(make: Callable[..., list[Plan]]) -> tuple[Tensor, Tensor]:
        inner, outer = make(gate)
        sent, _ = thin.gated(rows, gate, outer, stats="active", impl="auto")
        return deep.gated(rows, gate, inner, outer, stats="active", impl="auto")[0], sent

    def make(gate: Tensor) -> list[Plan]:
        return make_plans(gate, layout, reaches=(1, 0))

    for a, b in zip(both(torch.compile(make, backend="eager")), both(make), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
