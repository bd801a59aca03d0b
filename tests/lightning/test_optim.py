"""Parameter groups and schedules."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler

from dyndet import build_detector
from dyndet.cli.compose import build, compose_experiment
from dyndet.errors import UserError
from dyndet.lightning.optim import WarmupCosine, build_optimizer, one_cycle, warmup_multistep


def test_published_weight_decay_exceptions() -> None:
    detector = build_detector("shapes_dyn")
    optimizer = build_optimizer(
        detector,
        optimizer=partial(SGD, momentum=0.9),
        lr=0.01,
        weight_decay=1e-4,
        lr_scales={"backbone": 0.5, "gates": 0.1},
    )
    names = {id(parameter): name for name, parameter in detector.named_parameters()}
    groups = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert set(groups) == {name for name, p in detector.named_parameters() if p.requires_grad}
    for decayed in ("head.cls.0.gates.depth.conv.bias", "head.cls.0.scale_weight", "head.cls.0.output_weight"):
        assert groups[decayed]["weight_decay"] == 1e-4
    for free in ("head.cls.0.depth.norm1.weight", "head.reg.1.up.norm.bias", "backbone.body.conv1.1.weight"):
        assert groups[free]["weight_decay"] == 0
    assert groups["backbone.body.conv1.0.weight"]["lr"] == 0.005
    assert groups["predictor.cls.bias"]["lr"] == 0.01
    assert groups["head.reg.1.gates.up.conv.weight"]["lr"] == pytest.approx(0.001)


def test_frozen_parameters_are_left_out() -> None:
    with torch.device("meta"):
        detector = build_detector("fcos_r50")
    optimizer = build_optimizer(detector, optimizer=SGD, lr=0.01)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    body = detector.backbone.body  # type: ignore[attr-defined]
    assert all(id(p) not in trained for p in [*body.conv1.parameters(), *body.layer1.parameters()])
    assert all(id(p) not in trained for p in body.layer3[0].bn1.parameters())
    assert id(body.layer2[0].conv1.weight) in trained


def rates(schedule: str, steps: list[int]) -> list[float]:
    config = compose_experiment(schedule)
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    scheduler = build(config.optim.schedule)(optimizer, total_steps=90_000)
    return [0.01 * scheduler.lr_lambdas[0](step) for step in steps]


def test_the_published_schedule() -> None:
    steps = [0, 500, 1000, 59_999, 60_000, 79_999, 80_000]
    expected = [1e-5, 0.01 * (0.001 + 0.999 / 2), 0.01, 0.01, 1e-3, 1e-3, 1e-4]
    assert rates("fcos_d8_dyn", steps) == pytest.approx(expected)
    config = compose_experiment("fcos_d8_dyn")
    assert config.trainer.max_steps == 90_000 and config.data.batch_size == 16
    assert config.optim.optimizer.lr == 0.01 and config.optim.optimizer.weight_decay == 1e-4


def test_one_cycle_keeps_the_ratio_of_groups() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = SGD([{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:], "lr": 0.03}], lr=0.1)
    scheduler = one_cycle(optimizer, total_steps=10, pct_start=0.3)
    for _ in range(9):
        a, b = (group["lr"] for group in optimizer.param_groups)
        assert b / a == pytest.approx(0.3)
        optimizer.step()
        scheduler.step()


def test_multistep_without_warmup_starts_at_full_rate() -> None:
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup_multistep(optimizer, total_steps=10, milestones=[5], warmup_steps=0)
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_one_cycle_whose_way_up_is_one_step() -> None:
    """Torch's own schedule divides by zero there."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = one_cycle(optimizer, total_steps=4, pct_start=0.25)
    rates = []
    for _ in range(4):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        if len(rates) < 4:
            scheduler.step()
    assert rates == [pytest.approx(rate, abs=1e-5) for rate in (0.1, 0.075, 0.025, 0.0)]


def test_a_one_cycle_run_can_be_extended() -> None:
    """The longer schedule takes over at the step reached; the saved length does not come back with the state."""

    def cycle(total_steps: int) -> tuple[SGD, LRScheduler]:
        optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
        return optimizer, one_cycle(optimizer, total_steps=total_steps)

    def advance(optimizer: SGD, scheduler: LRScheduler, steps: int) -> float:
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
        return optimizer.param_groups[0]["lr"]

    short, long, resumed = cycle(10), cycle(30), cycle(30)
    advance(*short, 9)
    resumed[1].load_state_dict(short[1].state_dict())
    assert advance(*resumed, 15) == pytest.approx(advance(*long, 24))


def test_decay_goes_by_the_last_part_of_a_name() -> None:
    """DyHead's `scale` is a module with weights, an implicit layer's a vector."""
    detector = torch.nn.ModuleDict({"scale": torch.nn.Linear(2, 2)})
    groups = build_optimizer(detector, optimizer=SGD, lr=0.1, weight_decay=0.5, decay_scales={"scale": 0, "bias": 0})
    decay = {id(p): group["weight_decay"] for group in groups.param_groups for p in group["params"]}
    assert (decay[id(detector["scale"].weight)], decay[id(detector["scale"].bias)]) == (0.5, 0.0)


def yolo_groups() -> SGD:
    """One group of weights, one of biases."""
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [p], "biases": biases} for p, biases in zip(parameters, (False, True), strict=True)]
    return SGD(groups, lr=0.01, momentum=0.937)


def test_yolo_warmup_and_cosine_by_hand() -> None:
    optimizer = yolo_groups()
    scheduler = WarmupCosine(optimizer, total_steps=300, final=0.1, warmup_steps=30)
    seen = []
    for _ in range(301):
        weights, biases = optimizer.param_groups
        seen.append((weights["lr"], biases["lr"], weights["momentum"]))
        optimizer.step()
        scheduler.step()
    assert seen[0] == (0.0, 0.1, 0.8)
    assert seen[15][0] == pytest.approx(0.5 * 0.01 * cosine(15 / 300))
    assert seen[15][1] == pytest.approx(0.5 * 0.1 + 0.5 * 0.01 * cosine(15 / 300))
    assert seen[15][2] == pytest.approx((0.8 + 0.937) / 2)
    assert seen[150] == pytest.approx((0.0055, 0.0055, 0.937))
    assert seen[300] == pytest.approx((0.001, 0.001, 0.937))


def cosine(progress: float) -> float:
    """As the spec writes it: (1 - cos(pi t)) / 2 * (final - 1) + 1."""
    return (1 - math.cos(math.pi * progress)) / 2 * (0.1 - 1) + 1


def test_yolo_warmup_of_a_short_run_is_short() -> None:
    optimizer = yolo_groups()
    scheduler = WarmupCosine(optimizer, total_steps=50, warmup_steps=1000)
    for _ in range(5):
        assert optimizer.param_groups[0]["lr"] < optimizer.param_groups[1]["lr"]
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[1]["lr"])


def test_yolo_resumes_inside_the_warmup() -> None:
    """Rates and momentum go on as without the interruption, in a run that was made longer."""

    def start(total_steps: int) -> tuple[SGD, WarmupCosine]:
        optimizer = yolo_groups()
        return optimizer, WarmupCosine(optimizer, total_steps=total_steps, warmup_steps=20, warmup_share=1.0)

    def advance(optimizer: SGD, scheduler: WarmupCosine, steps: int) -> list[float]:
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
        return [group[key] for group in optimizer.param_groups for key in ("lr", "momentum")]

    short, long, resumed = start(50), start(100), start(100)
    advance(*short, 7)
    resumed[0].load_state_dict(short[0].state_dict())
    resumed[1].load_state_dict(short[1].state_dict())
    for steps in (1, 5, 30):
        assert advance(*resumed, steps) == pytest.approx(advance(*long, 8 if steps == 1 else steps))


def test_what_does_not_decay_in_yolo() -> None:
    detector = build_detector("shapes_dy_yolo")
    config = compose_experiment("shapes_dy_yolo", ["optim=yolo"])
    optimizer = build(config.optim.optimizer)(detector)
    names = {id(parameter): name for name, parameter in detector.named_parameters()}
    decays = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    biases = {names[id(p)]: group["biases"] for group in optimizer.param_groups for p in group["params"]}
    assert set(decays) == set(names.values())
    for name, decay in decays.items():
        convolution = name.endswith("weight") and "norm" not in name
        assert decay == (1e-3 if convolution else 0.0), name
        assert biases[name] == name.endswith("bias"), name


def steps_of_drops(total_steps: int, **keys: object) -> list[int]:
    """Where the rate falls from one step to the next."""
    config = compose_experiment(None, ["optim=sgd", *(f"optim.schedule.{key}={value}" for key, value in keys.items())])
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    (factor,) = build(config.optim.schedule)(optimizer, total_steps=total_steps).lr_lambdas
    return [step for step in range(1, total_steps) if factor(step) < factor(step - 1)]


@pytest.mark.parametrize(
    ("total_steps", "drops"),
    [(90_000, [60_030, 80_010]), (900, [600, 800]), (9, [6, 8])],
)
def test_milestones_in_shares_fit_any_run(total_steps: int, drops: list[int]) -> None:
    assert steps_of_drops(total_steps) == drops
    assert steps_of_drops(900, milestones="[0.5,800]") == [450, 800]


def test_the_warmup_is_a_share_of_short_runs() -> None:
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    for total_steps, end in ((400, 20), (90_000, 1000)):
        scheduler = warmup_multistep(optimizer, total_steps=total_steps, milestones=[0.9], warmup_share=0.05)
        (factor,) = scheduler.lr_lambdas  # type: ignore[attr-defined]
        assert factor(end - 1) < 1 == factor(end)


@pytest.mark.parametrize(
    ("total_steps", "keys", "words"),
    [
        (2000, [], "run of 2000 steps: milestones lie at 60000, 80000. Give shares"),
        (70_000, [], "milestones lie at 80000"),
        (900, ["optim.schedule.milestones=[0.5]"], "run of 900 steps: the warm-up takes 1000 steps. Give"),
        (1000, [], "the warm-up takes 1000 steps and milestones lie at 60000, 80000"),
        (1000, ["optim.schedule.milestones=[0,0.5]"], "give steps, or shares of the run above 0"),
    ],
)
def test_a_schedule_that_the_run_never_reaches_is_refused(total_steps: int, keys: list[str], words: str) -> None:
    schedule = build(compose_experiment("fcos_d8_dyn", keys).optim.schedule)
    with pytest.raises(UserError, match=words):
        schedule(SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01), total_steps=total_steps)


def test_in_a_trial_of_few_steps_it_is_said() -> None:
    schedule = build(compose_experiment("fcos_d8_dyn").optim.schedule)
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    with pytest.warns(UserWarning, match="does not fit into this run of 2 steps"):
        schedule(optimizer, total_steps=2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)
