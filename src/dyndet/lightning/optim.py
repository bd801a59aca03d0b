"""Parameter groups and learning-rate schedules. All schedules count optimizer steps, not epochs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from dyndet.errors import UserError

TRIAL = 50
"""A run of fewer steps is a trial, whose schedule does not matter."""

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)


def build_optimizer(
    detector: nn.Module,
    *,
    optimizer: Callable[..., Optimizer],
    lr: float,
    weight_decay: float = 0.0,
    norm_decay: float = 0.0,
    lr_scales: Mapping[str, float] | None = None,
    decay_scales: Mapping[str, float] | None = None,
    split_biases: bool = False,
) -> Optimizer:
    """One group per (learning rate, decay): normalisation layers decay by `norm_decay`, everything else that trains,
    gate biases and path scalars included, by `weight_decay` (the published exceptions).

    Args:
        detector: whose parameters that need gradients are optimised.
        optimizer: called with the groups, for instance a partial of `torch.optim.SGD`.
        lr: base learning rate.
        weight_decay: of everything but norms.
        norm_decay: of norm layers.
        lr_scales: factors of the learning rate by a part of the parameter's name, for instance {"backbone": 0.3,
            "gates": 0.3}; several that apply multiply.
        decay_scales: factors of the decay by the last part of the name, for instance {"bias": 0.0}.
        split_biases: biases are groups of their own, marked `biases`, for `WarmupCosine`.
    """
    groups: dict[tuple[float, float, bool], list[Parameter]] = {}
    for name, parameter, is_norm in _parameters(detector):
        parts = name.split(".")
        rate = lr * math.prod(scale for part, scale in (lr_scales or {}).items() if part in parts)
        decay = norm_decay if is_norm else weight_decay
        decay *= math.prod(scale for part, scale in (decay_scales or {}).items() if part == parts[-1])
        groups.setdefault((rate, decay, split_biases and parts[-1] == "bias"), []).append(parameter)
    return optimizer(
        [
            {"params": list_, "lr": rate, "weight_decay": decay} | ({"biases": biases} if split_biases else {})
            for (rate, decay, biases), list_ in groups.items()
        ],
        lr=lr,
    )


def _parameters(model: nn.Module) -> Iterator[tuple[str, Parameter, bool]]:
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{prefix}.{name}" if prefix else name, parameter, isinstance(module, _NORMS)


def warmup_multistep(
    optimizer: Optimizer,
    *,
    total_steps: int,
    milestones: Sequence[float],
    gamma: float = 0.1,
    warmup_steps: int = 1000,
    warmup_share: float | None = None,
    warmup_factor: float = 0.001,
) -> LRScheduler:
    """Linear warm-up from `warmup_factor`, then a drop by `gamma` at each milestone (1x: 60k and 80k of 90k).

    Args:
        optimizer: whose rates are those after the warm-up.
        total_steps: of the run.
        milestones: steps, or shares of the run: [0.667, 0.889] fits a run of any length.
        gamma: factor at each milestone.
        warmup_steps: length of the warm-up; 0 for none.
        warmup_share: at most this share of the run is warm-up, where given.
        warmup_factor: share of the rate at the start.

    Raises:
        UserError: if the run never reaches a milestone or the end of the warm-up. A run of less than `TRIAL` steps, to
            see whether things work, gets a warning.
    """
    if min(milestones, default=1) <= 0:
        raise UserError(f"optim.schedule.milestones={list(milestones)}: give steps, or shares of the run above 0")
    drops = [_step(milestone, total_steps) for milestone in milestones]
    warmup = warmup_steps if warmup_share is None else min(warmup_steps, int(warmup_share * total_steps))
    _check_reached(total_steps, warmup, drops)

    def factor(step: int) -> float:
        if step < warmup:
            return warmup_factor + (1 - warmup_factor) * step / warmup
        return gamma ** sum(step >= drop for drop in drops)

    return LambdaLR(optimizer, factor)


def _step(milestone: float, total_steps: int) -> float:
    """Of a milestone that may be a share: 1 is the first step, 1.0 all of the run."""
    return round(milestone * total_steps) if isinstance(milestone, float) and milestone <= 1 else milestone


def _check_reached(total_steps: int, warmup: int, drops: Sequence[float]) -> None:
    late = [int(drop) for drop in drops if drop >= total_steps]
    problems = [f"the warm-up takes {warmup} steps"] if warmup and warmup >= total_steps else []
    problems += [f"milestones lie at {', '.join(map(str, late))}"] if late else []
    if not problems:
        return
    message = (
        f"optim.schedule does not fit into this run of {total_steps} steps: {' and '.join(problems)}. Give shares of "
        "the run, as in 'optim.schedule.milestones=[0.667,0.889]' optim.schedule.warmup_share=0.05, or choose "
        "optim=one_cycle, which fits any run"
    )
    if total_steps >= TRIAL:
        raise UserError(message)
    rank_zero_warn(message)


class WarmupCosine(LRScheduler):
    """Down to a share of the rate along half a cosine, after a warm-up in which biases come from above (YOLOv7).

    Args:
        optimizer: whose groups say whether they hold `biases`.
        total_steps: of the run, warm-up included.
        final: share of the rate at the end.
        warmup_steps: over which rates rise from 0, and momentum from `warmup_momentum`; the cosine runs on below.
        warmup_share: at most this share of the run is warm-up, for short ones.
        bias_start: rate of the biases at the start.
        warmup_momentum: momentum at the start; None leaves it alone.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        total_steps: int,
        final: float = 0.1,
        warmup_steps: int = 1000,
        warmup_share: float = 0.1,
        bias_start: float = 0.1,
        warmup_momentum: float | None = 0.8,
    ) -> None:
        self.total_steps = total_steps
        self.final = final
        self.warmup_steps = min(warmup_steps, int(warmup_share * total_steps))
        self.bias_start = bias_start
        self.warmup_momentum = warmup_momentum
        self.base_momenta = [group.get("momentum") for group in optimizer.param_groups]
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        progress = min(self.last_epoch / self.total_steps, 1.0)
        factor = (1 + math.cos(math.pi * progress)) / 2 * (1 - self.final) + self.final
        warm = min(self.last_epoch / self.warmup_steps, 1.0) if self.warmup_steps else 1.0
        rates = []
        for group, base, momentum in zip(self.optimizer.param_groups, self.base_lrs, self.base_momenta, strict=True):
            start = self.bias_start if group.get("biases") else 0.0
            rates.append(start + (base * factor - start) * warm)
            if momentum is not None and self.warmup_momentum is not None:
                group["momentum"] = self.warmup_momentum + (momentum - self.warmup_momentum) * warm
        return rates

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps its own length, so that a run can be extended."""
        own = {key: getattr(self, key) for key in ("total_steps", "warmup_steps")}
        super().load_state_dict(state_dict | own)


def one_cycle(optimizer: Optimizer, *, total_steps: int, **kwargs: Any) -> LRScheduler:
    """Torch's one-cycle schedule over the whole run, each group to its own peak; for short runs."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    rise = kwargs.pop("pct_start", 0.3)
    if rise * total_steps == 1:  # torch divides by zero where the way up is one step long
        rise *= 1 - 1e-9
    return _OneCycle(optimizer, max_lr=peaks, total_steps=total_steps, pct_start=rise, **kwargs)


class _OneCycle(OneCycleLR):
    """Keeps its own length on resume, so that a run can be extended."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        length = {key: value for key, value in self.state_dict().items() if key in ("total_steps", "_schedule_phases")}
        super().load_state_dict(state_dict | length)
