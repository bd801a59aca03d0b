"""Runs that stop and go on: exact random state, and a checkpoint wherever they stop."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from dyndet.errors import DivergedError, WriteError
from dyndet.signals import Interrupted


class ExactResume(Callback):
    """Makes a resumed run continue as if it had never stopped (with the samplers of `DetectionDataModule`).

    Torch's random state is stored in checkpoints and restored at the first training batch after a resume; any earlier
    would not hold, since building data iterators draws from the same generator. And an epoch that Lightning forgets to
    count as begun, when it resumes from the last batch of the epoch before, is counted.

    Of several processes each gets its own state back. Those without a saved one are seeded with a number drawn from the
    first saved state, plus their rank: where a run goes on with more processes, where an interrupt ended it (processes
    that may have stopped elsewhere are not waited for, so that the checkpoint holds its writer's state alone), and with
    checkpoints from before states of all processes were kept.

    A step that breaks off before its update is rolled back: random state and buffers (running statistics) are those of
    its start. A checkpoint from before or amid a validation says so, and a resumed run validates first, see
    `dyndet.lightning.going_on`.

    A checkpoint inside a window of gradient accumulation also holds the gradients of the window's first batches, of
    several processes their mean (after an interrupt its writer's). Where an interrupt came amid a backward pass there
    are none to keep, and the run goes back to the start of the window, see `dyndet.lightning.going_on`.
    """

    def __init__(self) -> None:
        self._pending: dict[str, Any] | None = None
        self._restored = False
        self._whole = True  # gradients are those of whole batches
        self._before: State | None = None  # what a step or a validation that breaks off goes back to
        self._window: State | None = None  # the same where it breaks off amid gradients that are accumulated
        self._updating = False  # weights may be half of this step and half of the one before
        self._validated = -1  # batches before the last validation
        self._together = False  # all processes save

    @property
    def restorable(self) -> bool:
        """Whether a checkpoint written now would be of whole steps."""
        return not self._updating

    @property
    def before(self) -> State | None:
        """What a step or a validation that is under way began with; None between them."""
        return self._before

    def state_dict(self) -> dict[str, Any]:
        return random_state() if self._before is None else dict(self._before.random)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lightning dumps checkpoints on every process."""
        alone = trainer.world_size == 1 or (trainer.interrupted and not self._together)
        if not alone:
            states: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(states, self.state_dict())
            checkpoint["callbacks"][self.state_key] = {"processes": states}
        if self._owes_validation(trainer):
            checkpoint["callbacks"][self.state_key]["owes_validation"] = True
        if self._whole and _inside_window(trainer):
            gradients = {name: _gradient(p, alone) for name, p in pl_module.named_parameters() if p.requires_grad}
            kept = {name: value for name, value in gradients.items() if value is not None}
            checkpoint["callbacks"][self.state_key]["gradients"] = {
                "window": trainer.accumulate_grad_batches,
                "values": kept,
            }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pending, self._restored = state_dict, False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        epochs = trainer.fit_loop.epoch_progress
        counts = epochs.state_dict()["current"]
        if counts["ready"] == counts["processed"]:
            epochs.increment_ready()
            epochs.increment_started()
        if self._pending is not None:
            gradients = self._pending.get("gradients", {"values": {}})["values"]
            for name, parameter in pl_module.named_parameters():
                if name in gradients:
                    parameter.grad = gradients[name].to(parameter.device, copy=True)
            if not self._restored:
                self._restore(trainer)
            self._pending = None
        self._before = State(pl_module)
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._window = self._before

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._whole = False

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        self._whole = False

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._updating = True

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._whole, self._updating, self._before = True, False, None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if self._pending is not None and self._pending.get("owes_validation"):
            self._restore(trainer)
        self._before = State(None)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._before, self._validated = None, _batches(trainer)["total"]["processed"]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Before the checkpoint callbacks, which save."""
        self._together = isinstance(exception, Interrupted)
        if self._before is not None and self.restorable:
            if not self._whole and self._window is not None:
                self._before = self._window  # there is no going on from within the window
            self._before.put_back()

    def _owes_validation(self, trainer: Trainer) -> bool:
        """Whether the next thing to do is to validate."""
        loop, counts = trainer.fit_loop.epoch_loop, _batches(trainer)
        fetcher = trainer.fit_loop._data_fetcher
        if trainer.state.fn != TrainerFn.FITTING or fetcher is None or trainer.sanity_checking:
            return False
        between = counts["current"]["ready"] == counts["current"]["processed"] > 0
        return between and self._validated != counts["total"]["processed"] and loop._should_check_val_fx(fetcher)

    def _restore(self, trainer: Trainer) -> None:
        assert self._pending is not None
        self._restored = True
        _restore(self._pending.get("processes", [self._pending]), trainer.global_rank)


class State:
    """Random state, and a copy of a module's buffers.

    Args:
        module: None keeps no buffers.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self.random = random_state()
        self._buffers = [] if module is None else list(module.buffers())
        with torch.no_grad():
            self._copies = [buffer.clone() for buffer in self._buffers]

    def put_back(self, where: Tensor | None = None) -> None:
        """Undoes what has changed the buffers since.

        Args:
            where: () bool on the buffers' device, whether to: decided there, so that nothing waits; None: in any case.
        """
        with torch.no_grad():
            for buffer, copy in zip(self._buffers, self._copies, strict=True):
                buffer.copy_(copy if where is None else torch.where(where, copy, buffer))


def state_of_step(trainer: Trainer, module: LightningModule) -> State:
    """The state at the start of a step that begins: what `ExactResume` keeps, its own where there is none."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    kept = (callback.before for callback in callbacks if isinstance(callback, ExactResume))
    return next((state for state in kept if state is not None), None) or State(module)


def random_state() -> dict[str, Any]:
    """Of torch's generators on the host and on this process's GPU."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # not of a run on the CPU
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _batches(trainer: Trainer) -> dict[str, Any]:
    """Counts of batches, in all and in this epoch."""
    return trainer.fit_loop.epoch_loop.batch_progress.state_dict()


def _inside_window(trainer: Trainer) -> bool:
    """Whether batches were processed since the last step."""
    window = trainer.accumulate_grad_batches
    if window == 1:
        return False
    done = _batches(trainer)["current"]["processed"]
    return bool(done % window) and done < trainer.num_training_batches


def _gradient(parameter: Tensor, alone: bool) -> Tensor | None:
    """Of this process, or the mean of all."""
    if alone:
        return parameter.grad
    mean = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
    dist.all_reduce(mean)
    return mean / dist.get_world_size()


def _restore(states: list[dict[str, Any]], rank: int) -> None:
    if rank >= len(states):
        first = torch.Generator().set_state(states[0]["cpu"].cpu())
        torch.manual_seed(int(torch.randint(2**62, (), generator=first)) + rank)
        return
    torch.set_rng_state(states[rank]["cpu"].cpu())
    if "cuda" in states[rank] and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states[rank]["cuda"].cpu())


class LastCheckpoint(ModelCheckpoint):
    """Saves interrupted runs as well, but not when one of several processes fails: the others would never join it.

    A run that ends inside an epoch, by `max_steps`, a limit of time or another callback, is saved and validated where
    it stands: Lightning would close its epoch first, so that a resumed run skipped the rest. The last epoch is saved
    whether it is validated or not.
    """

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_end(trainer, *args, **kwargs)
        if _ends_here(trainer):
            self._save(trainer)
            trainer.should_stop = True  # validates

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and _ends_here(trainer):
            self._save(trainer)  # knows the score, too

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _at_max_steps(trainer) or (
            trainer.should_stop and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        ):
            return
        super().on_train_epoch_end(trainer, pl_module)
        ends = trainer.current_epoch + 1 == trainer.max_epochs
        if ends and not self._should_skip_saving_checkpoint(trainer):
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if not getattr(trainer, "fast_dev_run", False):
            self._save_checkpoint(trainer, self.format_checkpoint_name(self._monitor_candidates(trainer)))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves where it is safe to: not what diverges, nor half a step, nor when other processes have stopped."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        exact = [callback for callback in callbacks if isinstance(callback, ExactResume)]
        if isinstance(exception, DivergedError | WriteError) or trainer.sanity_checking or not self.save_on_exception:
            return  # the last good checkpoint stays
        if not all(callback.restorable for callback in exact):
            return
        stopped_together = trainer.world_size == 1 or isinstance(exception, Interrupted)
        if trainer.state.fn == TrainerFn.FITTING and stopped_together and _batches(trainer)["total"]["processed"]:
            self._save(trainer)


def _ends_here(trainer: Trainer) -> bool:
    return trainer.should_stop or _at_max_steps(trainer)


def _at_max_steps(trainer: Trainer) -> bool:
    return 0 < trainer.max_steps <= trainer.global_step
