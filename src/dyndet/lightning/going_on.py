"""Where a resumed run goes on: in the data, in its schedule, and with the optimizer settings of today.

A checkpoint brings what was learned: weights, the optimizer's moments, counts of steps. Rates, decays and the shape of
the schedule come from the configuration, so that what it says is what happens.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from dyndet.errors import UserError
from dyndet.lightning.optim import WarmupCosine
from dyndet.lightning.resume import ExactResume

_CLOSED_FORM = (LambdaLR, OneCycleLR, WarmupCosine)
"""Schedules whose rates follow from the step alone."""


def parameter_names(module: LightningModule, optimizer: Optimizer) -> list[str]:
    """What an optimizer works on, in the order in which its state counts it."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [names.get(id(parameter), "?") for parameter in _parameters(optimizer)]


def align_data(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Puts a checkpoint's place in its epoch into batches of today, at the start of a window of gradient accumulation
    unless the gradients of its first batches can be used.

    Args:
        checkpoint: changed in place.
        trainer: of the run that goes on, with its data.
    """
    data: Any = getattr(trainer, "datamodule", None)
    state = checkpoint.get(type(data).__qualname__)
    if not state or "batches" not in state:
        return
    then, batches = state["order"], state["batches"]
    now = {"images": len(data.train), "batch_size": data.batch_size, "world_size": trainer.world_size}
    same = all(then.get(name) == value for name, value in now.items())
    callback = checkpoint.get("callbacks", {}).get(ExactResume.__qualname__, {})
    gradients = callback.get("gradients")
    window = trainer.accumulate_grad_batches
    place = batches
    if not (same and gradients and gradients["window"] == window):
        callback.pop("gradients", None)
        place -= place % (gradients["window"] if gradients else _window(checkpoint))
        if not same:
            share = place * then["batch_size"] * then["world_size"] / max(then["images"], 1)
            each = now["batch_size"] * now["world_size"]
            place = min(int(share * now["images"] / each), max(now["images"] // each - 1, 0))
        place -= place % window
        if same and place != batches:
            rank_zero_warn(
                f"resuming is not exact: {batches - place} batches are done again, whose gradients were accumulated "
                "but are not in the checkpoint, or of another trainer.accumulate_grad_batches"
            )
    if same and callback.get("owes_validation"):
        _validate_first(checkpoint["loops"]["fit_loop"])
    if place != batches:
        state["batches"] = place
        current = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        for count in ("ready", "started", "processed", "completed"):
            current[count] += place - batches


def _validate_first(loop: dict[str, Any]) -> None:
    """Makes a checkpoint from before or amid a validation one from the beginning of that validation."""
    counts = loop["epoch_loop.batch_progress"]
    for progress in (counts["total"], counts["current"]):
        progress["completed"] = progress["processed"]
    validation = loop["epoch_loop.val_loop.batch_progress"]
    validation["is_last_batch"] = False
    for progress in (validation["total"], validation["current"]):
        progress.update(ready=1, started=1, processed=0, completed=0)


def forget_scores(checkpoint: dict[str, Any], module: LightningModule) -> None:
    """Drops what is the best so far where it was measured on another validation set, or in another size.

    Args:
        checkpoint: changed in place.
        module: of the run that goes on.
    """
    then, now = (
        (config or {}).get("data") or {}
        for config in (checkpoint["dyndet"].get("config"), getattr(module, "config", None))
    )
    changed = [key for key in now if _of_validation(key) and key in then and then[key] != now[key]]
    states = checkpoint.get("callbacks", {})
    scores = [
        key for key, state in states.items() if "best_score" in state or state.get("best_model_score") is not None
    ]
    if changed and scores:
        for key in scores:
            del states[key]
        keys = ", ".join(f"data.{key}" for key in changed)
        rank_zero_info(f"{keys}: the validation set is another one, so that the best score so far does not count")


def _of_validation(key: str) -> bool:
    return key in ("max_val", "size", "max_size", "hard_fraction") or (
        key.startswith("val") and key != "val_batch_size"
    )


def _window(checkpoint: dict[str, Any]) -> int:
    """Batches per step of the run that wrote a checkpoint."""
    trainer = (checkpoint["dyndet"].get("config") or {}).get("trainer") or {}
    value = trainer.get("accumulate_grad_batches")
    return value if isinstance(value, int) and value > 0 else 1


def continue_optimizer(
    checkpoint: dict[str, Any],
    module: LightningModule,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    total_steps: float,
) -> None:
    """Makes a checkpoint's optimizer and schedule those of today at the place that the run has reached.

    Args:
        checkpoint: changed in place, before its states are loaded.
        module: with its trainer.
        optimizer: new.
        scheduler: new, or None.
        total_steps: of the run; infinite where only a clock or a callback ends it.

    Raises:
        UserError: if the state cannot be that of this optimizer, or the schedule is one of another library whose
            settings were changed.
    """
    saved = checkpoint["optimizer_states"][0]
    state = _assigned(checkpoint, parameter_names(module, optimizer), optimizer)
    if not (scheduler is None or isinstance(scheduler, _CLOSED_FORM)):
        present: Any = getattr(module, "config", None)
        before, now = ((config or {}).get("optim") for config in (checkpoint["dyndet"]["config"], present))
        if before != now:
            raise UserError(
                f"optim was changed, but {type(scheduler).__name__} cannot take other settings in a resumed run: go on "
                "with those of the checkpoint, or start a new run from its weights with init="
            )
        return
    if scheduler is not None and checkpoint["lr_schedulers"]:
        reached = checkpoint["lr_schedulers"][0]["last_epoch"]
        endless = math.isinf(total_steps)
        step = reached if endless else min(_reached(checkpoint, module.trainer, reached), int(total_steps))
        if step != reached:
            rank_zero_info(
                f"the schedule goes on at {step / total_steps:.0%} of the run: at step {step} of {int(total_steps)}, "
                f"which is as far as {reached} steps were before"
            )
        advance(scheduler, step)
        checkpoint["lr_schedulers"] = [scheduler.state_dict()]
    checkpoint["optimizer_states"] = [{**saved, "state": state, "param_groups": optimizer.state_dict()["param_groups"]}]


def advance(scheduler: LRScheduler, step: int) -> None:
    """A new schedule, at a later step."""
    if step:
        scheduler.last_epoch = step - 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch wants steps of the optimizer first
            scheduler.step()


def _assigned(checkpoint: dict[str, Any], names: list[str], optimizer: Optimizer) -> dict[int, Any]:
    """The saved state by today's numbers of parameters, which depend on how they are grouped."""
    saved = checkpoint["optimizer_states"][0]
    then: list[str] | None = checkpoint["dyndet"].get("optimised")
    if then is None:  # older checkpoints: the order must be the same
        sizes = [
            [len(group["params"]) for group in groups] for groups in (saved["param_groups"], optimizer.param_groups)
        ]
        if sizes[0] != sizes[1]:
            raise UserError(
                "ckpt_path: the parameters are grouped otherwise than in the checkpoint (optim.optimizer.lr_scales, "
                "decays): go on with the settings that it was trained with, or start a new run from it with init="
            )
        return saved["state"]
    place: Mapping[str, int] = {name: index for index, name in enumerate(then)}
    found = {index: saved["state"].get(place.get(name, -1)) for index, name in enumerate(names)}
    return {index: value for index, value in found.items() if value is not None}


def _reached(checkpoint: dict[str, Any], trainer: Trainer, steps: int) -> int:
    """Steps of the schedule that are done: where epochs end the run, as many as the epochs so far have today."""
    state = checkpoint.get(type(getattr(trainer, "datamodule", None)).__qualname__)
    if trainer.max_epochs in (None, -1) or trainer.max_steps != -1 or not state or "batches" not in state:
        return steps
    window = trainer.accumulate_grad_batches
    return state["epoch"] * math.ceil(trainer.num_training_batches / window) + state["batches"] // window


def _parameters(optimizer: Optimizer) -> list[Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
