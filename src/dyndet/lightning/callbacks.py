"""What is shown and written around training: the progress line and a result file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from dyndet.disk import write_whole
from dyndet.lightning.writing import writing


class ResultFile(Callback):
    """Writes the latest validation numbers to `result.json` in the run's folder, for reports."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "result.json"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        numbers = {key: float(value) for key, value in trainer.callback_metrics.items()}
        result = {key: value for key, value in numbers.items() if math.isfinite(value)}
        result |= {"step": trainer.global_step, "epoch": trainer.current_epoch}
        with writing(trainer, self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps(result, indent=1) + "\n")


class Progress(RichProgressBar):
    """Rich progress bar with the last AP and the share of the head that ran."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        for name, key in (("AP", "val/AP"), ("head", "macs/head_ratio")):
            if key in trainer.callback_metrics:
                items[name] = float(trainer.callback_metrics[key])
        return items
