"""float32 kernels are as precise as torch lets dense convolutions be: TF32 where it allows that, else IEEE.

The interpreter rounds nothing, so launches are read as they would go to a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dyndet import kernels
from dyndet.ops.sparse import Norm, RowLayout, conv, conv_work, make_plans, whole_plan
from dyndet.ops.sparse.backend import allows_tf32

launch = kernels.launch
TARGET = launch.Target(90, 132)
LAYOUT = RowLayout(((160, 160),), 1, torch.device("cpu"))
SETTINGS = ["tf32", "ieee", "legacy tf32", "legacy ieee"]


@pytest.fixture
def tf32(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Sets what is asked for, by the present or the older way; both are as torch starts afterwards."""
    allowed = request.param.endswith("tf32")
    if request.param.startswith("legacy"):
        torch.backends.cudnn.allow_tf32 = allowed
    else:
        torch.backends.cudnn.conv.fp32_precision = request.param
    yield allowed
    torch.backends.cudnn.allow_tf32 = True


def step(x: Tensor, weight: Tensor, expected: float | None = None) -> Tensor:
    """Two convolutions: the gradient of the first goes to a map, that of the second to rows."""
    inner, outer = make_plans(x[:-1, 0].detach(), LAYOUT, reaches=(1, 0), expected=expected, impl="triton")
    x = conv(x, weight, source=whole_plan(LAYOUT), target=inner, impl="triton")
    return conv(x, weight, source=inner, target=outer, impl="triton")


def products(run: Callable[[], Any]) -> list[launch.Launch]:
    """The matrix products that `run` would start."""
    with launch.recorded(TARGET) as launches:
        run()
    return [item for item in launches if "precision" in item.options]


def tile_of(item: launch.Launch) -> tuple[int, ...]:
    return tuple(item.options[f"block_{axis}"] for axis in ("rows", "columns", "depth"))


def tables(kind: kernels.configs.Kind) -> list[tuple[int, ...]]:
    """Tiles of the forward direction and of the weight gradient."""
    rows = LAYOUT.positions * kernels.configs.DENSITY
    found = [
        next(tile for limit, tile in table[90, kind] if rows <= limit)
        for table in (kernels.configs.CONV, kernels.configs.WEIGHT_GRAD)
    ]
    return [(tile.rows, tile.columns, tile.depth) for tile in found]


@pytest.mark.parametrize("tf32", SETTINGS, indirect=True)
def test_all_passes_follow_the_setting_of_convolutions(tf32: bool) -> None:
    x, weight = torch.randn(LAYOUT.positions + 1, 256, requires_grad=True), torch.randn(256, 256, 3, 3)
    weight.requires_grad_()
    found = products(lambda: step(x, weight).sum().backward())
    names = [item.kernel.__name__ for item in found]
    assert names.count("gather_gemm") == 4  # two forward, two of the input's gradient
    assert names.count("weight_grad_gemm") == 2
    assert {item.options["precision"] for item in found} == {"tf32" if tf32 else "ieee"}
    forward, weight_grad = tables("tf32" if tf32 else "single")
    for item in found:
        assert tile_of(item) == (weight_grad if item.kernel.__name__ == "weight_grad_gemm" else forward)


@pytest.mark.parametrize("tf32", ["tf32", "ieee"], indirect=True)
def test_the_fused_norm_and_the_count_of_rows_follow_it_too(tf32: bool) -> None:
    x, weight, vector = torch.randn(LAYOUT.positions + 1, 256), torch.randn(256, 256, 3, 3), torch.ones(256)
    (plan,) = make_plans(torch.ones(LAYOUT.positions), LAYOUT, expected=1.0, impl="triton")
    whole = whole_plan(LAYOUT)

    @torch.no_grad()
    def run() -> None:
        norm = Norm(vector, vector, 32, stats="position")
        conv(x, weight, source=whole, target=plan, norm=norm, impl="triton")

    (item,) = products(run)
    assert item.options["group"] == 8
    assert item.options["precision"] == ("tf32" if tf32 else "ieee")
    with launch.recorded(TARGET):
        assert conv_work(x, weight, target=plan, impl="triton").tile == item.options["block_rows"]
    assert item.options["block_rows"] == (128 if tf32 else 64)


def test_other_types_have_a_precision_of_their_own() -> None:
    assert allows_tf32(torch.float32)  # as torch starts
    x, weight = torch.randn(LAYOUT.positions + 1, 16).bfloat16(), torch.randn(16, 16, 3, 3).bfloat16()
    assert {item.options["precision"] for item in products(lambda: step(x, weight))} == {"ieee"}


@pytest.mark.parametrize("tf32", ["tf32", "ieee"], indirect=True)
def test_a_compiled_graph_holds_the_setting(tf32: bool) -> None:
    torch.compiler.reset()
    x, weight = torch.randn(LAYOUT.positions + 1, 16, requires_grad=True), torch.randn(16, 16, 3, 3)
    weight.requires_grad_()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = products(lambda: compiled(x, weight).sum().backward())
    assert len(found) == 6
    assert {item.options["precision"] for item in found} == {"tf32" if tf32 else "ieee"}
