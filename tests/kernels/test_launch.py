"""What every launcher promises: a clear refusal without a GPU, and no look at a value on the device."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from pyramid import SMALL, assert_close, poisoned, random, random_gate
from test_conv_backward import dense_gradients, rows_of

from dyndet import kernels

configs, launch = kernels.configs, kernels.launch


@pytest.mark.parametrize("capability", [80, 86, 90, 100, 120])
def test_launchers_never_look_at_values(capability: int) -> None:
    """A meta tensor has none: .item(), .cpu(), nonzero and every shape that depends on data would raise."""

    def meta(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    total, channels = 50, 16
    rows, vector = meta(total + 1, channels, dtype=torch.bfloat16), meta(channels, dtype=torch.float32)
    weight, single = (meta(channels, size, 3, 3, dtype=torch.bfloat16) for size in (channels, 1))
    gate, statistics = meta(total, dtype=torch.float32), meta(4, 2, dtype=torch.float32)
    neighbours, segment = meta(total, 9), meta(total)
    with launch.recorded(launch.Target(capability, 100)) as launches:
        (plan,) = kernels.plan(gate, None, neighbours, segment, 4, (1,))
        assert len(launches) == 2
        gather = (plan.positions, plan.inverse, neighbours, plan.offsets)
        around = (plan.inverse, segment, plan.offsets)
        assert kernels.conv(rows, weight, None, *gather).shape == (total + 1, channels)
        assert len(launches) == 4
        kernels.conv_weight_grad(rows, rows, *gather)
        kernels.depthwise(rows, single, None, *gather, scatter=True)
        kernels.depthwise_weight_grad(rows, rows, *gather)
        start = len(launches)
        kernels.group_norm(rows, vector, vector, plan.offsets, groups=2, eps=1e-5, stats="active", relu=True)
        kernels.scatter_add(rows, vector, vector, gate, rows, *around, groups=2, eps=1e-5, stats="active", relu=True)
        assert len(launches) == start + 4
        operands = (rows, rows, rows, vector, statistics, statistics)
        kernels.group_norm_backward(*operands, plan.offsets, stats="active")
        operands = (rows, rows, rows, vector, vector, statistics, statistics, gate)
        kernels.scatter_add_backward(*operands, plan.positions, plan.offsets, stats="active", residual=True)


def test_refuses_the_cpu() -> None:
    program = (
        "import torch; from dyndet import kernels; z = torch.zeros(1, dtype=torch.int32);"
        "kernels.plan(torch.ones(1), None, z.new_zeros(1, 9), z, 1, (0,))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "RuntimeError: dyndet.kernels run on a GPU" in result.stderr


def test_many_programs_share_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests run few programs with many tiles each; here several split each sum, some of them without rows."""
    monkeypatch.setattr(launch, "_target", lambda device: launch.Target(80, 20))
    plan = SMALL.plan(random_gate(SMALL, 0.8), reach=0)
    count = int(plan.offsets[-1])
    x, grad = random(SMALL.total, 16), random(count, 16, seed=1)
    arguments = (plan.positions, None, SMALL.neighbours, plan.offsets)
    dense = grad.new_zeros(SMALL.total, 16)
    dense[plan.positions[:count].long()] = grad
    weight = random(16, 16, 3, 3, seed=2)
    full = dense_gradients(SMALL, x, weight, dense)
    rows, grad_rows = poisoned(x, SMALL.total), poisoned(grad, SMALL.total)
    weight_grad, bias_grad = kernels.conv_weight_grad(rows, grad_rows, *arguments)
    assert_close(weight_grad, full[1], 1e-5)
    assert_close(bias_grad, full[2], 1e-5)
    depthwise = dense_gradients(SMALL, x, weight[:, :1], dense, groups=16)
    weight_grad, bias_grad = kernels.depthwise_weight_grad(rows, grad_rows, *arguments)
    assert_close(weight_grad, depthwise[1], 1e-5)
    assert_close(bias_grad, depthwise[2], 1e-5)
    out = kernels.conv(rows, weight, None, *arguments)
    assert_close(out[:count], rows_of(plan, SMALL.conv(x.double(), weight.double())), 2e-6)


def run_guarded(item: launch.Launch) -> None:
    """Run a recorded launch on copies of its tensors that lie between guards, which must stay as they are."""
    arguments, checks = [], []
    for argument in item.arguments:
        if not isinstance(argument, torch.Tensor):
            arguments.append(argument)
            continue
        assert argument.is_contiguous()
        size, poison = argument.numel(), -1 if argument.dtype == torch.int32 else 77
        buffer = argument.new_full((size + 128,), poison)
        inner = buffer[64 : 64 + size].view(argument.shape)
        inner.copy_(argument)
        arguments.append(inner)
        checks.append((argument, inner, buffer, poison))
    launch.run(item.kernel, item.grid, *arguments, **item.options)
    for argument, inner, buffer, poison in checks:
        assert (buffer[:64] == poison).all() and (buffer[64 + argument.numel() :] == poison).all(), item.kernel
        argument.copy_(inner)


@pytest.mark.parametrize("stats", ["active", "position"])
def test_nothing_outside_is_touched(stats: kernels.Stats) -> None:
    """Every kernel, writing between guards."""
    gate, total = random_gate(SMALL, 0.9), SMALL.total
    x, vector = random(total + 1, 24), random(24)
    weight, single = random(24, 24, 3, 3, seed=1), random(24, 1, 3, 3, seed=1)
    options: dict[str, Any] = {"groups": 3, "stats": stats, "relu": True}
    fused = kernels.PositionNorm(vector, vector, 3, 1e-5, True)
    with launch.recorded(launch.Target(80, 1)) as launches:
        (plan,) = kernels.plan(gate, None, SMALL.neighbours, SMALL.segment, SMALL.segments, (1,))
        gather = (plan.positions, plan.inverse, SMALL.neighbours, plan.offsets)
        around = (plan.inverse, SMALL.segment, plan.offsets)
        kernels.conv(x, weight, vector, *gather, norm=fused)
        kernels.conv(x, weight, None, *gather, transposed=True, scatter=True)
        kernels.conv_weight_grad(x, x, *gather)
        kernels.depthwise(x, single, vector, *gather)
        kernels.depthwise_weight_grad(x, x, *gather)
        y, mean, rstd = kernels.group_norm(x, vector, vector, plan.offsets, eps=1e-5, **options)
        kernels.group_norm_backward(x, x, y, vector, mean, rstd, plan.offsets, stats=stats)
        z, mean, rstd = kernels.scatter_add(x, vector, vector, gate, x, *around, eps=1e-5, **options)
        operands = (x, z, x, vector, vector, mean, rstd, gate)
        kernels.scatter_add_backward(*operands, plan.positions, plan.offsets, stats=stats, residual=False)
    assert len({item.kernel.__name__ for item in launches}) >= 11
    for item in launches:
        run_guarded(item)


def test_tiles_fit_their_problem() -> None:
    tile = configs.Tile(128, 128, 64, 8, 3, 1)
    assert configs.shrink(tile, depth=88).depth == 32
    assert configs.shrink(tile, depth=256).depth == 64
    assert configs.shrink(tile, depth=3).depth == 16
    assert configs.shrink(tile, columns=88, rows=5) == configs.Tile(16, 128, 64, 8, 3, 1)
    target = launch.Target(90, 132)
    few = configs.tile(configs.CONV, target, torch.bfloat16, 100_000, 0.01, False)
    many = configs.tile(configs.CONV, target, torch.bfloat16, 100_000, 1.0, False)
    assert few.rows * few.columns < many.rows * many.columns


def test_rows_of_a_tile() -> None:
    x, weight = random(9, 256, dtype=torch.bfloat16), random(256, 256, 3, 3, dtype=torch.bfloat16)
    assert kernels.tile_rows(x, weight, 100_000, 0.01) <= kernels.tile_rows(x, weight, 100_000, 1.0)
    assert kernels.tile_rows(x, weight[:, :1], 100_000) == 16
