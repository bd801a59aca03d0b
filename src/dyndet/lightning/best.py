"""The best of all validations, the one after the run included."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from dyndet.lightning.writing import lost, write_checkpoint, writing
from dyndet.sealed import read_sealed

_SCORES = ("best_k_models", "best_model_path", "best_model_score", "kth_best_model_path", "kth_value")


class BestCheckpoint(ModelCheckpoint):
    """Saves at a validation whose score is the best so far.

    Args:
        dirpath: folder.
        filename: without its ending.
        monitor: the score; more is better.
    """

    def __init__(self, dirpath: str | Path, *, filename: str = "best", monitor: str = "val/AP") -> None:
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            mode="max",
            save_on_train_epoch_end=False,  # at validation, while the epoch stands where it is
            enable_version_counter=False,
        )

    @property
    def state_key(self) -> str:
        """Under the name that it had before it was a class of its own."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def renew(self, trainer: Trainer, last: Path) -> None:
        """Takes the checkpoint of the final weights if their validation, after the run, is the best.

        Both files know that score then, so that a run that goes on from either does not fall behind it.

        Args:
            trainer: after `validate`.
            last: the checkpoint of the weights that were validated.
        """
        score = trainer.callback_metrics.get(str(self.monitor))
        if score is None:
            return
        score = score.nan_to_num(nan=-torch.inf)  # of images without objects, say; as Lightning has it
        if not self.check_monitor_top_k(trainer, score):
            return
        assert self.dirpath is not None
        best = Path(self.dirpath) / f"{self.filename}{self.FILE_EXTENSION}"
        self.best_model_path = self.kth_best_model_path = str(best)
        self.best_model_score = self.current_score = self.kth_value = score
        self.best_k_models = {str(best): score}
        if trainer.is_global_zero:
            content = read_sealed(last)
            content["callbacks"][self.state_key] = self.state_dict()
            with writing(trainer, best):
                for path in (best, last):
                    write_checkpoint(content, path)
        trainer.strategy.barrier("best")

    def _update_best_and_save(self, current: Tensor, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """A best checkpoint that the disk did not take is none: the next may be the best as well."""
        before = {name: copy.copy(getattr(self, name)) for name in _SCORES}
        super()._update_best_and_save(current, trainer, monitor_candidates)
        if lost(trainer, self.best_model_path):
            vars(self).update(before)
