"""The head expects of its plans what earlier steps found, without waiting for a count; copies are played by hand."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from dyndet.models.heads import expected_density as density
from dyndet.models.heads import fine_grained
from dyndet.models.heads.fine_grained import FineGrainedHead
from dyndet.ops.sparse import Plan, RowLayout, backend, choose
from dyndet.structures import HeadOutput

SHAPES = ((8, 8), (4, 4))
PLANS = 8  # of two branches with one node each


class Forced(nn.Module):
    """Opens the first positions, as many as it is told."""

    joint = False
    share = 1.0

    def forward(self, logits: Tensor, layout: RowLayout) -> Tensor:
        first = torch.arange(layout.positions) < self.share * layout.positions
        return first.float().expand_as(logits)

    def logit(self, openness: float) -> float:
        return 0.0


class Event:
    """Of a copy that is done when the test says so; whoever waits for it fails."""

    def __init__(self) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done

    def __reduce__(self) -> str:
        raise TypeError("an event cannot be copied")


class Device:
    """A head as on a GPU: its plans, and its copies to the host."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.plans: list[Plan] = []
        self.events: list[Event] = []
        self.capturing = False
        make = fine_grained.make_plans

        def plans(*args: object, **kwargs: object) -> list[Plan]:
            with patch.context() as compiling:  # there is room for every position, and the host knows nothing
                compiling.setattr(torch.compiler, "is_compiling", lambda: True)
                found = make(*args, **kwargs)  # type: ignore[arg-type]
            self.plans += found
            return found

        def send(values: Tensor) -> tuple[Tensor, Event]:
            assert values.dtype == torch.int32 and values.shape == (PLANS,)
            self.events.append(Event())
            return values.clone(), self.events[-1]

        patch.setattr(fine_grained, "make_plans", plans)
        patch.setattr(fine_grained, "counted_later", lambda x, impl: True)
        patch.setattr(density, "send", send)
        patch.setattr(density, "capturing", lambda: self.capturing)

    def step(self, head: FineGrainedHead, share: float) -> tuple[HeadOutput, list[float | None]]:
        """A forward pass with this share of open gates, and the densities it expected of its plans."""
        for node in (*head.cls, *head.reg):
            node.activation.share = share  # type: ignore[union-attr]
        self.plans.clear()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            output = head([torch.randn(1, 8, *shape, generator=generator) for shape in SHAPES])
        return output, [plan.density for plan in self.plans]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def make(**options: object) -> FineGrainedHead:
    torch.manual_seed(0)
    options = {"activation": Forced(), "norm_groups": 2, "depth": 1, "scale_init": 1.0, **options}
    return FineGrainedHead(8, **options).eval()  # type: ignore[arg-type]


def choices(expected: list[float | None]) -> set[str]:
    """What "auto" would take for such plans on a GPU."""
    return {choose("auto", share, 8, torch.float32, torch.device("cuda")) for share in expected}


def test_open_gates_are_expected_until_something_is_known(device: Device) -> None:
    _, expected = device.step(make(), 0.1)
    assert len(expected) == PLANS
    assert all(share is not None and share >= 0.99 for share in expected)
    assert choices(expected) == {"dense"}
    _, expected = device.step(make(openness=0.1), 0.1)
    assert expected[:2] == [0.1, 0.1] and choices(expected) == {"triton"}


def test_what_a_step_found_is_expected_of_the_next(device: Device) -> None:
    head = make()
    device.step(head, 0.1)
    device.events[0].done = True
    _, expected = device.step(head, 1.0)
    # The first row of the finest level is open, 8 of 80 positions; it sends nothing up, and its neighbours are 16.
    assert expected == [8 / 80, 0.0, 16 / 80, 8 / 80] * 2
    assert choices(expected) == {"triton"}
    device.events[1].done = True
    _, expected = device.step(head, 0.1)
    assert expected == [64 / 80, 16 / 80, 1.0, 1.0] * 2


def test_what_is_expected_changes_the_execution_and_no_result(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "serves", lambda device: True)
    head = make(impl="auto")
    outputs = []
    for executed_densely in (True, False):
        output, _ = device.step(head, 0.1)
        assert {item.dense is not None for item in output.routing.work} == {executed_densely}
        device.events[-1].done = True
        outputs.append([*output.cls, *output.reg])
    for a, b in zip(*outputs, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_an_unfinished_copy_leaves_what_was_known(device: Device) -> None:
    head = make()
    _, first = device.step(head, 0.1)
    for _ in range(2):
        _, expected = device.step(head, 0.1)
        assert expected == first
    assert len(device.events) == 1  # one copy at a time
    device.events[0].done = True
    assert device.step(head, 0.1)[1] != first
    assert len(device.events) == 2


def test_a_stated_density_wins(device: Device) -> None:
    head = make(expected_density=0.3)
    for _ in range(2):
        _, expected = device.step(head, 1.0)
        assert expected == [0.3, 0.3, 1 - 0.7**2.3, 0.3] * 2
    assert not device.events


def test_nothing_is_learned_while_a_graph_is_captured(device: Device) -> None:
    head = make()
    device.capturing = True
    device.step(head, 0.1)
    assert not device.events
    device.capturing = False
    device.step(head, 0.1)
    device.events[0].done = device.capturing = True
    assert choices(device.step(head, 0.1)[1]) == {"dense"}
    device.capturing = False
    assert choices(device.step(head, 0.1)[1]) == {"triton"}


def test_copies_know_what_was_known(device: Device) -> None:
    head = make()
    device.step(head, 0.1)
    device.events[0].done = True
    device.step(head, 1.0)  # whose counts are still on their way
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), head.to(torch.float32)):
        assert choices(device.step(twin, 1.0)[1]) == {"triton"}
    assert set(head.state_dict()) == set(make().state_dict())


def test_on_a_cpu_nothing_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where densities are known."""
    monkeypatch.setattr(density, "send", lambda values: pytest.fail("a copy was started"))
    for impl in ("auto", "triton"):
        head = make(impl=impl)
        with torch.no_grad():
            head([torch.randn(1, 8, *shape) for shape in SHAPES])
