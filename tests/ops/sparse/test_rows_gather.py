"""Gathered convolutions in many chunks, and where "auto" gives them up."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F

from dyndet.ops.sparse import RowLayout, conv, make_plans, whole_plan
from dyndet.ops.sparse.backend import choose, crossover

CPU = torch.device("cpu")


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_many_chunks_against_float64(dtype: torch.dtype, error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("dyndet.ops.sparse.torch_backend.conv")
    monkeypatch.setattr(module, "_LEAST_BYTES", 1)
    monkeypatch.setattr(module, "_MOST_BYTES", 1)  # the least that is taken: 64 rows
    torch.manual_seed(0)
    layout = RowLayout(((17, 19), (9, 10)), 2, CPU)
    (plan,) = make_plans(torch.rand(layout.positions) < 0.4, layout)
    assert 3 * 64 < plan.capacity < 6 * 64
    x = torch.randn(layout.positions + 1, 8).to(dtype)
    x[-1] = 0
    weight, grad = torch.randn(5, 8, 3, 3).to(dtype), torch.randn(plan.capacity + 1, 5).to(dtype)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    out = conv(x, weight, source=whole_plan(layout), target=plan, impl="gather")[:-1]
    found = [out, *torch.autograd.grad(out, (x, weight), grad[:-1])]

    exact, kernel = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    rows = layout.rows([F.conv2d(level, kernel, padding=1) for level in layout.maps(exact)])
    wanted = [rows[plan.positions.long()]]
    wanted += torch.autograd.grad(wanted[0], (exact, kernel), grad[:-1].double())
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and one.dtype == dtype
        assert (one.double() - other).norm() < error * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_gathers_up_to_the_crossover_which_grows_with_the_channels(dtype: torch.dtype) -> None:
    limits = [crossover(channels, dtype, CPU) for channels in (3, 32, 64, 96, 128, 256, 1024)]
    assert limits == sorted(limits) and limits[0] > 0 and limits[-1] < 1
    for channels, limit in zip((3, 1024), (limits[0], limits[-1]), strict=True):
        assert choose("auto", limit - 0.01, channels, dtype, CPU) == "gather"
        assert choose("auto", limit, channels, dtype, CPU) == "dense"
    assert choose("auto", None, 3, dtype, CPU) == "gather"  # nobody knows
    assert choose("gather", 1.0, 3, dtype, CPU) == "gather"
