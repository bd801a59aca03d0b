"""The open share of every gate as a table, for loggers that take tables."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger


class DensityTable(Callback):
    """After each validation, one row per gate (node, path, level): the share of positions that were open."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        shares = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("gates/")}
        rows = [[*key.removeprefix("gates/").split("/"), share] for key, share in shares.items() if key.count("/") == 2]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and rows:
                logger.log_table("gates", columns=["gate", "level", "open"], data=rows)
