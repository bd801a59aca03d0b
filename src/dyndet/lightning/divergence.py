"""Guards a run against values that are no numbers: no update is made of them, and no checkpoint is written."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from dyndet.errors import DivergedError, UserError
from dyndet.lightning.dump import Seen, dump_step
from dyndet.lightning.interruption import near
from dyndet.lightning.nonfinite import any_lost, first_lost, saved_values
from dyndet.lightning.resume import State, state_of_step

_ADVICE = "Start again, or go on from the last good checkpoint, with a lower optim.optimizer.lr or a longer warm-up"
_OVERFLOWS = 30
"""Halved so often, no scale of a loss is the reason any more why gradients overflow."""


class DivergenceWatch(Callback):
    """Looks at the loss and at all gradients before every update, and at all that is saved before it is written.

    Where one is no number, the update is not made, and running statistics are those from before its batches. Several
    processes decide alike. Overflows of 16-mixed, whose scaler leaves out the update itself, count only when they do
    not end.

    On a GPU an optimizer with `fused=true` leaves out the update by itself, and the answer is read when it is there,
    some steps later; when the run then stops, no update was made since, and when it goes on, the batch is kept with the
    weights of that moment. For other optimizers every step waits for the GPU before its update.

    Args:
        every: at most so many steps wait for their answer; None or 0 is 10.
        policy: "stop" ends the run, "skip" goes on with the next batch.
        max_skipped: updates of a run that are left out before it ends, too.
        folder: where the batches of such a step are written to, see `dyndet.replay`; None writes nothing.
    """

    def __init__(
        self,
        every: int | None = None,
        *,
        policy: str = "stop",
        max_skipped: int = 10,
        folder: str | Path | None = None,
    ) -> None:
        if policy not in ("stop", "skip"):
            raise UserError(f"on_nonfinite={policy}: choose stop or skip")
        if max_skipped < 0:
            raise UserError(f"max_skipped={max_skipped}: give a whole number from 0")
        self.every = every or 10
        self.policy = policy
        self.max_skipped = max_skipped
        self.folder = None if folder is None else Path(folder)
        self.skipped = 0
        self._overflows = 0  # in a row
        self._exempt: set[str] = set()  # what holds infinities from the start
        self._window: list[Seen] = []
        self._before: State | None = None
        self._waiting: deque[_Asked] = deque()
        self._stopped: Tensor | None = None  # () bool on the device: no update any more

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._exempt = {
            name
            for name, buffer in pl_module.named_buffers()
            if buffer.is_floating_point() and bool(buffer.isinf().any())
        }
        self._window, self._waiting, self._stopped = [], deque(), None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        state = state_of_step(trainer, pl_module)
        if batch_idx % trainer.accumulate_grad_batches == 0 or self._before is None:
            self._window, self._before = [], state
        self._window.append(Seen(batch, state.random))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._window[-1].loss = loss.detach()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert self._before is not None
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        losses = [seen.loss for seen in self._window if seen.loss is not None]
        given = [value for seen in self._window for _, value in seen.given()]  # boxes that are none match nothing
        gradients = [p.grad.coalesce().values() if p.grad.is_sparse else p.grad for p in parameters]
        lost = any_lost([*gradients, *losses, *given], pl_module.device)
        if trainer.world_size > 1:  # each has its own losses
            anywhere = lost.to(torch.int32)
            dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
            lost = anywhere.bool()
        asked = _Asked(trainer.global_step, self._window, self._before, lost)
        if _scaler(trainer) is None and self._decided_there(lost) and skips_by_itself(optimizer):
            self._leave_out_there(optimizer, asked)
            return
        self._read_answers(trainer, pl_module, most=0)
        if getattr(optimizer, "found_inf", None) is not None and _scaler(trainer) is None:
            optimizer.found_inf = None  # type: ignore[attr-defined]  # of an earlier step
        if bool(lost):
            self._before.put_back()
            asked.gradient = first_lost((name, p.grad) for name, p in pl_module.named_parameters())
            asked.terms = _terms(trainer.callback_metrics)
            for parameter in parameters:
                parameter.grad = None  # optimizers leave alone what has none
            self._answer(trainer, pl_module, asked)
        else:
            self._overflows = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._waiting and self._waiting[-1].batches is self._window and isinstance(outputs, Mapping):
            self._waiting[-1].terms = outputs.get("terms", {})
        self._read_answers(trainer, pl_module, most=self.every)
        if self.skipped:
            pl_module.log("train/skipped", float(self.skipped))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read_answers(trainer, pl_module, most=0)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._read_answers(trainer, pl_module, most=0)
        values = {
            name: value
            for name, value in saved_values(trainer, pl_module)
            if value.is_floating_point() and name.removeprefix("the average of ") not in self._exempt
        }
        devices = {value.device for value in values.values()}
        if any(bool(any_lost([v for v in values.values() if v.device == device], device)) for device in devices):
            name = first_lost(values.items())
            kind = "weights" if name in dict(pl_module.named_parameters()) else "values that a checkpoint keeps"
            raise DivergedError(f"the {kind} are no numbers at step {trainer.global_step}: {name}. Nothing was saved. "
                                f"{_ADVICE}")  # fmt: skip

    def _decided_there(self, lost: Tensor) -> bool:
        """Whether to look at the answer would wait for a device."""
        return lost.is_cuda

    def _leave_out_there(self, optimizer: Any, asked: _Asked) -> None:
        """Lets the device decide about the update; it stays at its decision where the run is to stop."""
        if self.policy == "stop":
            self._stopped = asked.lost if self._stopped is None else self._stopped | asked.lost
            asked.lost = self._stopped
        optimizer.found_inf, optimizer.grad_scale = asked.lost.to(torch.float32), None
        asked.before.put_back(asked.lost)
        asked.send()
        self._waiting.append(asked)

    def _read_answers(self, trainer: Trainer, module: LightningModule, *, most: int) -> None:
        while self._waiting and (len(self._waiting) > most or self._waiting[0].is_there()):
            asked = self._waiting.popleft()
            asked.wait()
            if bool(asked.lost):
                self._waiting.clear() if self.policy == "stop" else None
                self._answer(trainer, module, asked)

    def _answer(self, trainer: Trainer, module: LightningModule, asked: _Asked) -> None:
        """After an update that was left out.

        Raises:
            DivergedError: if the run is to end.
        """
        scaler = _scaler(trainer)
        self._overflows += 1
        if scaler is not None and self._overflows < _OVERFLOWS:
            return
        self.skipped += scaler is None
        ends = self.policy == "stop" or scaler is not None or self.skipped > self.max_skipped
        text = f"{asked.fault()} at step {asked.step}, so the update was left out: {asked.images()}"
        if scaler is not None:
            text += f". {self._overflows} steps in a row were so"
        elif self.policy == "skip":
            text += f" (number {self.skipped} of this run; max_skipped={self.max_skipped})"
        text += self._dumped(trainer, module, asked, text)
        if ends:
            hint = "" if self.policy == "skip" or scaler is not None else "; on_nonfinite=skip leaves such batches out"
            raise DivergedError(f"{text}. {_ADVICE}{hint}")
        rank_zero_warn(text)

    def _dumped(self, trainer: Trainer, module: LightningModule, asked: _Asked, fault: str) -> str:
        mine = any(seen.faulty() for seen in asked.batches)
        if self.folder is None or not (mine or trainer.is_global_zero):
            return ""
        try:
            file = dump_step(self.folder, trainer, module, asked.batches, step=asked.step, fault=fault)
        except OSError as error:
            return f". The batch could not be written ({error.strerror or error})"
        return f". dyndet replay {near(file)} shows where it arose"


@dataclass
class _Asked:
    """A step, and whether the update is left out.

    Attributes:
        step: how many were done before.
        batches: of the step.
        before: the state before them.
        lost: () bool, whether the loss or a gradient is no number.
        terms: of the loss of the last batch.
        gradient: the first parameter whose gradient is no number, where that is known.
    """

    step: int
    batches: list[Seen]
    before: State
    lost: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    gradient: str | None = None
    _sent: Any = None

    def send(self) -> None:
        """Begins to fetch the answer."""
        there, self.lost = self.lost, torch.empty((), dtype=torch.bool, pin_memory=self.lost.is_cuda)
        self.lost.copy_(there, non_blocking=True)
        if there.is_cuda:
            self._sent = torch.cuda.Event()
            self._sent.record()

    def is_there(self) -> bool:
        return self._sent is None or self._sent.query()

    def wait(self) -> None:
        if self._sent is not None:
            self._sent.synchronize()

    def fault(self) -> str:
        if name := first_lost(value for seen in self.batches for value in seen.given()):
            return f"{name} are no numbers"
        if any(seen.lost() for seen in self.batches):
            terms = ", ".join(name for name, value in self.terms.items() if not bool(torch.isfinite(value).all()))
            return f"the loss is no number ({terms})" if terms else "the loss is no number"
        if self.gradient is not None:
            return f"the gradient of {self.gradient} is no number"
        return "a gradient is no number"

    def images(self) -> str:
        lost = [seen for seen in self.batches if seen.faulty()] or self.batches
        found = [name for seen in lost for name in seen.names()]
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        return f"images {', '.join(found[:8])}{more}" if found else "a batch of lessons"


def skips_by_itself(optimizer: Optimizer) -> bool:
    """Whether an optimizer reads `found_inf` on the device, and leaves out the update if it says so.

    Not before it has a state: momenta that begin with no numbers would keep them.
    """
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and all(p in optimizer.state for group in optimizer.param_groups for p in _with_gradients(group))


def _with_gradients(group: Mapping[str, Any]) -> Iterable[Tensor]:
    return (parameter for parameter in group["params"] if parameter.grad is not None)


def _scaler(trainer: Trainer) -> Any:
    """Of 16-mixed."""
    return getattr(trainer.precision_plugin, "scaler", None)


def _terms(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What was logged of the loss."""
    return {
        name.removeprefix("train/"): value
        for name, value in metrics.items()
        if name.startswith("train/") and name != "train/loss"
    }
