"""`python -m dyndet.train [+experiment=NAME] [key=value ...]`: trains, validates, and shows where compute went."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf
from torch import nn

from dyndet.checkpoint import resume_path
from dyndet.command import run
from dyndet.config import build
from dyndet.lightning.detection import DetectionModule
from dyndet.report.summary import print_summary

log = logging.getLogger(__name__)


def train(config: DictConfig) -> dict[str, float]:
    """Runs one experiment and returns its last metrics."""
    seed_everything(config.seed, workers=True, verbose=False)
    checkpoint = resume_path(config)
    data = build(config.data.module)
    data.setup("fit")  # first, so that wrong paths show before anything slow
    module = DetectionModule(
        build(config.detector),
        categories=data.categories,
        optimizer=build(config.optim.optimizer),
        schedule=build(config.optim.schedule),
        config=cast(dict[str, Any], OmegaConf.to_container(config)),  # unresolved: keys can be overridden later
    )
    if config.channels_last:
        nn.Module.to(module, memory_format=torch.channels_last)
    if config.compile:
        for name in ("backbone", "neck"):  # static graphs; the head routes
            module.detector.get_submodule(name).compile()
    loggers = [build(item) for item in config.logger.values()]
    callbacks = [build(item) for item in config.callbacks.values() if item is not None]
    trainer: Trainer = build(config.trainer, logger=loggers, callbacks=callbacks)
    for logger in loggers:
        logger.log_hyperparams(OmegaConf.to_container(config, resolve=True))
    try:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        _finish(trainer, module, data, Path(config.output_dir))
    finally:
        _close(loggers)
    if trainer.received_sigterm:
        raise SystemExit(143)  # what a scheduler expects of a job that it ended
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    report = module.compute.compute()
    if trainer.is_global_zero:
        print_summary(report, metrics, Path(config.output_dir))
    return metrics


def _finish(trainer: Trainer, module: DetectionModule, data: Any, folder: Path) -> None:
    """Makes the last checkpoint and the last validation those of the final weights, whatever the intervals were."""
    if trainer.received_sigterm:
        return
    last = folder / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=True, mmap=True)["global_step"] if last.is_file() else -1
    trainer.strategy.barrier()
    if saved != trainer.global_step:
        trainer.save_checkpoint(last)
    if module.validated_step != trainer.global_step:
        trainer.validate(module, data, verbose=False)


def _close(loggers: list[Any]) -> None:
    """Ends every logger's run, so that the jobs of a multirun stay apart."""
    for logger in loggers:
        logger.finalize("success")
        finish = getattr(logger.experiment, "finish", None) if type(logger).__name__ == "WandbLogger" else None
        if finish is not None:
            finish()


if __name__ == "__main__":
    run(train, "train")
