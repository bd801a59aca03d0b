"""Parameter groups and learning-rate schedules. All schedules count optimizer steps, not epochs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)


def build_optimizer(
    detector: nn.Module,
    *,
    optimizer: Callable[..., Optimizer],
    lr: float,
    weight_decay: float = 0.0,
    norm_decay: float = 0.0,
    lr_scales: Mapping[str, float] | None = None,
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
    """
    groups: dict[tuple[float, float], list[Parameter]] = {}
    for name, parameter, is_norm in _parameters(detector):
        parts = name.split(".")
        rate = lr * math.prod(scale for part, scale in (lr_scales or {}).items() if part in parts)
        decay = norm_decay if is_norm else weight_decay
        groups.setdefault((rate, decay), []).append(parameter)
    return optimizer(
        [{"params": list_, "lr": rate, "weight_decay": decay} for (rate, decay), list_ in groups.items()], lr=lr
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
    milestones: Sequence[int],
    gamma: float = 0.1,
    warmup_steps: int = 1000,
    warmup_factor: float = 0.001,
) -> LRScheduler:
    """Linear warm-up from `warmup_factor`, then a drop by `gamma` at each milestone (1x: 60k and 80k of 90k)."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return warmup_factor + (1 - warmup_factor) * step / warmup_steps
        return gamma ** sum(step >= milestone for milestone in milestones)

    return LambdaLR(optimizer, factor)


def one_cycle(optimizer: Optimizer, *, total_steps: int, **kwargs: Any) -> LRScheduler:
    """Torch's one-cycle schedule over the whole run, each group to its own peak; for short runs."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    return _OneCycle(optimizer, max_lr=peaks, total_steps=total_steps, **kwargs)


class _OneCycle(OneCycleLR):
    """Keeps its own length on resume, so that a run can be extended."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        length = {key: value for key, value in self.state_dict().items() if key in ("total_steps", "_schedule_phases")}
        super().load_state_dict(state_dict | length)
