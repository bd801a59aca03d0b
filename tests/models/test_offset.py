"""The router's objective: which images should be hard."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dyndet.models.dynamicdet.offset import Constant, RunningMedian, make_offset, router_loss

NUMBERS = st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=40)


def test_the_loss_by_hand() -> None:
    logits = torch.tensor([0.0, torch.logit(torch.tensor(0.8)).item()], dtype=torch.float64)
    losses = torch.tensor([[3.0, 1.0], [2.0, 5.0]], dtype=torch.float64)
    expected = (0.5 * (3 - 0.2) + 0.5 * (2 + 0.2) + 0.2 * (1 - 0.2) + 0.8 * (5 + 0.2)) / 2
    assert float(router_loss(logits, losses, 0.4)) == pytest.approx(expected)


@given(NUMBERS, st.floats(-2, 2))
def test_the_gradient_depends_on_the_difference_and_the_offset_alone(differences: list[float], offset: float) -> None:
    """d loss / d logit = (D - d) s (1 - s), per image of the mean."""
    d = torch.tensor(differences, dtype=torch.float64)
    for base in (0.0, 7.0):
        logits = torch.linspace(-2, 2, len(d), dtype=torch.float64).requires_grad_()
        router_loss(logits, torch.stack([d + base, torch.full_like(d, base)]), offset).backward()
        s = logits.detach().sigmoid()
        assert logits.grad is not None
        torch.testing.assert_close(logits.grad, (offset - d) * s * (1 - s) / len(d))


@given(NUMBERS)
def test_a_running_median_of_everything_is_the_exact_one(values: list[float]) -> None:
    exact = make_offset("exact_median", differences=torch.tensor(values))
    running = RunningMedian()
    for start in range(0, len(values), 3):
        last = running(torch.tensor(values[start : start + 3]))
    assert last == pytest.approx(statistics.median(torch.tensor(values).tolist()))
    assert exact(torch.zeros(1)) == last


def test_half_of_the_images_lie_above_the_median() -> None:
    d = torch.randn(101, generator=torch.Generator().manual_seed(0))
    offset = make_offset("exact_median", differences=d)(d)
    assert int((d > offset).sum()) == 50


def test_after_many_images_the_running_median_is_taken_anew_only_sometimes() -> None:
    running = RunningMedian(exact_until=4, every=3)
    seen = [running(torch.tensor([float(value)])) for value in range(1, 10)]
    assert seen == [1, 1.5, 2, 2, 2, 3.5, 3.5, 3.5, 5]


def test_naive_variants() -> None:
    assert make_offset("zero", differences=None)(torch.ones(3)) == 0
    assert make_offset("weight", differences=None, weight=0.3)(torch.ones(3)) == 0.3
    with pytest.raises(ValueError, match="exact_median, running_median"):
        make_offset("median", differences=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="beforehand"):
        make_offset("exact_median", differences=None)


def test_state_goes_on() -> None:
    first, again = RunningMedian(), RunningMedian()
    first(torch.tensor([3.0, 1.0]))
    again.restore(first.state())
    assert first(torch.tensor([7.0])) == again(torch.tensor([7.0])) == 3
    constant = Constant(0.0)
    constant.restore([2.0])
    assert constant.state() == [2.0]
