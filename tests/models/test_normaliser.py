"""What four code bases divide their losses by."""

from __future__ import annotations

import copy

import pytest
import torch

from dyndet.models.predictors import normalise
from dyndet.models.predictors.normalise import Normaliser

COUNTS = torch.tensor([3, 0, 5])


@pytest.mark.parametrize(
    ("mode", "divisors"),
    [
        ("images", [9, 9, 9]),  # 3 + 1 + 5
        ("total", [8, 8, 8]),
        ("per_image", [9, 3, 15]),  # max(positives, 1) of the image, times the number of images
    ],
)
def test_divisors(mode: str, divisors: list[float]) -> None:
    normaliser = Normaliser(mode)  # type: ignore[arg-type]
    assert normaliser(COUNTS).tolist() == divisors
    assert not normaliser.state_dict()


@pytest.mark.parametrize(("mode", "divisors"), [("images", [2, 2]), ("total", [1, 1]), ("per_image", [2, 2])])
def test_batches_without_positives(mode: str, divisors: list[float]) -> None:
    assert Normaliser(mode)(torch.tensor([0, 0])).tolist() == divisors  # type: ignore[arg-type]


def test_the_average_moves_in_training_alone() -> None:
    normaliser = Normaliser("ema")
    assert normaliser.eval()(COUNTS).tolist() == [100] * 3
    normaliser.train()
    assert normaliser(COUNTS).tolist() == pytest.approx([90.8] * 3)  # 0.9 * 100 + 0.1 * 8
    assert normaliser(torch.tensor([0, 0])).tolist() == pytest.approx([81.82] * 2)  # no positives count as one
    assert normaliser.eval()(COUNTS).tolist() == pytest.approx([81.82] * 3)
    assert normaliser(COUNTS).tolist() == pytest.approx([81.82] * 3)


def test_start_and_momentum_of_the_average() -> None:
    assert Normaliser("ema", start=300.0, momentum=0.5)(COUNTS).tolist() == [154] * 3


def test_the_average_is_part_of_the_checkpoint() -> None:
    trained, fresh = Normaliser("ema"), Normaliser("ema")
    for _ in range(3):
        trained(COUNTS)
    assert list(trained.state_dict()) == ["average"]
    fresh.load_state_dict(copy.deepcopy(trained.state_dict()))
    assert torch.equal(fresh(COUNTS), trained(COUNTS))


def test_the_average_may_move_before_the_gradients_are_taken() -> None:
    """Two batches, one backward: the second must not change what the first divided by."""
    normaliser = Normaliser("ema")
    weight = torch.ones(3, requires_grad=True)
    first, second = (weight**2 / normaliser(COUNTS)).sum(), (weight**2 / normaliser(COUNTS)).sum()
    (first + second).backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == pytest.approx([2 / 90.8 + 2 / 82.52] * 3)


def test_divisors_handed_out_stay_as_they_were() -> None:
    normaliser = Normaliser("ema")
    first = normaliser(COUNTS)
    normaliser(COUNTS)
    assert first.tolist() == pytest.approx([90.8] * 3)


@pytest.mark.parametrize(
    ("mode", "counts", "divisor"),
    [
        ("images", [3, 0], 3.0),  # (3 + 1 + 2) / 2
        ("total", [3, 0], 2.5),
        ("total", [1, 0], 1.5),
        ("total", [0, 0], 1.0),  # the mean first, then at least one
        ("ema", [3, 0], 90.3),  # of this process alone
        ("per_image", [3, 0], 6.0),
    ],
)
def test_processes_share_their_mean(
    mode: str, counts: list[int], divisor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if one more process had summed to 2, or to 0 where this one has no positives."""
    other = 2.0 if sum(counts) else 0.0
    monkeypatch.setattr(normalise, "reduce_mean", lambda value: (value + other) / 2)
    assert Normaliser(mode)(torch.tensor(counts))[0].item() == pytest.approx(divisor)  # type: ignore[arg-type]


def test_total_is_clamped_after_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalise, "reduce_mean", lambda value: (value + 8) / 2)
    assert Normaliser("total")(torch.tensor([0])).item() == 4  # 4.5 if the zero became one first


def test_unknown_modes_are_named() -> None:
    with pytest.raises(ValueError, match="images, total, ema, per_image"):
        Normaliser("mean")  # type: ignore[arg-type]
