"""The gather GEMM against dense float64 convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pyramid import DTYPES, SMALL, TOLERANCE, Pyramid, assert_close, poisoned, random, random_gate

from dyndet import kernels


def layer(inputs: int, outputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    weight = random(outputs, inputs, 3, 3, seed=5, dtype=dtype).div_(3 * inputs**0.5)
    return weight.to(memory_format=torch.channels_last), random(outputs, seed=6, dtype=dtype)


def check(pyramid: Pyramid, out: torch.Tensor, plan: kernels.Plan, dense: torch.Tensor, tolerance: float) -> None:
    count = int(plan.offsets[-1])
    assert_close(out[:count], dense[plan.positions[:count].long()], tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 16), (88, 24), (3, 5)])
def test_whole_map_to_rows(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    plan = SMALL.plan(random_gate(SMALL), reach=0)
    x = random(SMALL.total, inputs, dtype=dtype)
    weight, bias = layer(inputs, outputs, dtype)
    out = kernels.conv(poisoned(x, SMALL.total), weight, bias, plan.positions, None, SMALL.neighbours, plan.offsets)
    assert out.dtype == dtype and out.shape == (SMALL.total + 1, outputs)
    check(SMALL, out, plan, SMALL.conv(x.double(), weight.double(), bias.double()), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_to_rows(transposed: bool, dtype: torch.dtype) -> None:
    gate = random_gate(SMALL)
    wide, narrow = SMALL.plan(gate, reach=1), SMALL.plan(gate, reach=0)
    source, goal = (narrow, wide) if transposed else (wide, narrow)
    weight, _ = layer(24, 16, dtype)
    count = int(source.offsets[-1])
    x = random(count, 16 if transposed else 24, dtype=dtype)
    out = kernels.conv(
        poisoned(x, SMALL.total),
        weight,
        None,
        goal.positions,
        source.inverse,
        SMALL.neighbours,
        goal.offsets,
        transposed=transposed,
    )
    dense = x.new_zeros(SMALL.total, x.shape[1], dtype=torch.float64)
    dense[source.positions[:count].long()] = x.double()
    if transposed:
        maps = [F.conv_transpose2d(level, weight.double(), padding=1) for level in SMALL.maps(dense)]
        expected = SMALL.rows(maps)
    else:
        expected = SMALL.conv(dense, weight.double())
    check(SMALL, out, goal, expected, TOLERANCE[dtype])


@settings(max_examples=6, deadline=None)
@given(st.sampled_from(["empty", "one", "full", "last"]), st.booleans())
def test_masks(kind: str, place: bool) -> None:
    gate = torch.zeros_like(random_gate(SMALL))
    if kind == "one":
        gate[11] = 1
    elif kind == "full":
        gate[:] = 1
    elif kind == "last":
        gate[-1] = 1
    plan = SMALL.plan(gate, reach=0)
    x = random(SMALL.total, 16)
    weight, bias = layer(16, 16, torch.float32)
    arguments = (plan.positions, None, SMALL.neighbours, plan.offsets)
    out = kernels.conv(poisoned(x, SMALL.total), weight, bias, *arguments, scatter=place)
    dense = SMALL.conv(x.double(), weight.double(), bias.double())
    if place:
        expected = torch.cat([dense * (gate > 0)[:, None], dense[:1] * 0])
        assert_close(out, expected, TOLERANCE[torch.float32])
    else:
        check(SMALL, out, plan, dense, TOLERANCE[torch.float32])


@pytest.mark.parametrize(("outputs", "groups", "relu"), [(32, 4, True), (48, 4, False), (88, 8, True), (64, 64, False)])
def test_position_norm(outputs: int, groups: int, relu: bool) -> None:
    plan = SMALL.plan(random_gate(SMALL), reach=1)
    x = random(SMALL.total, 16)
    weight, bias = layer(16, outputs, torch.float32)
    scale, shift = random(outputs, seed=7), random(outputs, seed=8)
    norm = kernels.PositionNorm(scale, shift, groups, 1e-5, relu)
    out = kernels.conv(
        poisoned(x, SMALL.total), weight, bias, plan.positions, None, SMALL.neighbours, plan.offsets, norm=norm
    )
    dense = SMALL.conv(x.double(), weight.double(), bias.double())
    expected = F.group_norm(dense, groups, scale.double(), shift.double(), 1e-5)
    check(SMALL, out, plan, expected.relu() if relu else expected, 1e-5)


@pytest.mark.parametrize("density", [0.01, 1.0, 1e3])
def test_hint_changes_no_result(density: float) -> None:
    plan = SMALL.plan(random_gate(SMALL), reach=0)
    x = random(SMALL.total, 64, dtype=torch.float16)
    weight, bias = layer(64, 64, torch.float16)
    arguments = (plan.positions, None, SMALL.neighbours, plan.offsets)
    out = kernels.conv(poisoned(x, SMALL.total), weight, bias, *arguments, density=density)
    dense = SMALL.conv(x.double(), weight.double(), bias.double())
    check(SMALL, out, plan, dense, TOLERANCE[torch.float16])


def test_shapes_are_checked() -> None:
    plan = SMALL.plan(random_gate(SMALL), reach=0)
    arguments = (plan.positions, None, SMALL.neighbours, plan.offsets)
    weight, _ = layer(16, 16, torch.float32)
    with pytest.raises(ValueError, match="rows must be"):
        kernels.conv(random(SMALL.total + 1, 8), weight, None, *arguments)
    with pytest.raises(ValueError, match="weight must be"):
        kernels.conv(random(SMALL.total + 1, 16, dtype=torch.float16), weight, None, *arguments)
