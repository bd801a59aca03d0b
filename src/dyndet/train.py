"""`python -m dyndet.train [+experiment=NAME] [key=value ...]`: trains, validates, and shows where compute went."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from omegaconf import DictConfig, OmegaConf
from torch import nn

from dyndet.checkpoints.read import check_resumable, resume_path
from dyndet.checkpoints.start_from import start_from, train_random_layers
from dyndet.checkup.examination import check_before_training
from dyndet.cli.command import run
from dyndet.cli.compose import build
from dyndet.cli.from_data import follow_data
from dyndet.cli.hyperparameters import hyperparameters
from dyndet.data.layouts.describe import describe
from dyndet.errors import MemoryShortageError, UserError
from dyndet.lightning.detection import DetectionModule
from dyndet.lightning.finish import closing, finish
from dyndet.lightning.halving import Sizes, check_on_oom, halve, memory_explained
from dyndet.lightning.interruption import Interruption, end_in_order, ending, tell_processes
from dyndet.lightning.joint import JointModule
from dyndet.lightning.step2 import router_parts
from dyndet.lightning.stopping import keep_ends
from dyndet.lightning.writing import WritePolicy, keep_logging, with_checkpoint_files
from dyndet.models.detectors.base import Detector
from dyndet.models.detectors.dynamic import DynamicDetector
from dyndet.report.summary import print_summary
from dyndet.signals import deferred


def train(config: DictConfig) -> dict[str, float]:
    """Runs one experiment and returns its last metrics."""
    check_on_oom(config)
    while True:
        try:
            return _train(config)
        except MemoryShortageError as shortage:
            if not (smaller := halve(config, shortage)):
                raise
        gc.collect()  # of what has failed
        torch.cuda.empty_cache()
        rank_zero_warn(smaller)


def _train(config: DictConfig) -> dict[str, float]:
    seed_everything(config.seed, workers=True, verbose=False)
    checkpoint = resume_path(config, rank_zero_info)
    policy = WritePolicy(config.on_write_error)
    keep_ends(config)
    if text := train_random_layers(config):
        rank_zero_info(text)
    data = images = build(config.data.module)
    data.quarantine.keep(config.output_dir)
    data.setup("fit")  # first: wrong paths show before anything slow, and the model gets the classes of the data
    if "num_classes" in config.data:
        config.data.num_classes = data.num_classes
    if text := describe(data):
        rank_zero_info(text)
    if chosen := follow_data(config, data):
        rank_zero_info(chosen)
    for line in check_before_training(data.train, data.val):
        rank_zero_info(f"data: {line}")
    if "router_loss" in config:
        module, data = router_parts(config, data)
        data.quarantine.keep(config.output_dir)
    else:
        if not (config.init is None and checkpoint is None) and "weights" in config.backbone:
            config.backbone.weights = "none"  # they come from the checkpoint
        detector: Detector = build(config.detector)
        if config.init is not None and checkpoint is None:
            rank_zero_info(start_from(detector, str(config.init), config, data.categories))
        kind = JointModule if isinstance(detector, DynamicDetector) else DetectionModule
        module = kind(
            detector,
            categories=data.categories,
            optimizer=build(config.optim.optimizer),
            schedule=build(config.optim.schedule),
            config=cast(dict[str, Any], OmegaConf.to_container(config)),  # unresolved: keys can be overridden later
        )
    if checkpoint is not None and (changes := check_resumable(checkpoint, module, data.categories, config)):
        rank_zero_info(changes)
    if config.channels_last:
        nn.Module.to(module, memory_format=torch.channels_last)
    if config.compile:
        if isinstance(module.detector, DynamicDetector):
            raise UserError("compile=true: a dynamic detector runs its backbones stage by stage; leave it false")
        for name in ("backbone", "neck"):  # static graphs; the head routes
            module.detector.get_submodule(name).compile()
    loggers, callbacks = (
        [build(item) for item in (config.get(group) or {}).values() if item and "_target_" in item]
        for group in ("logger", "callbacks")
    )
    callbacks = [sizes := Sizes(), *callbacks]
    plugins = with_checkpoint_files(config.trainer, policy)
    trainer: Trainer = build(config.trainer, logger=loggers, callbacks=callbacks, plugins=plugins)
    end_in_order(trainer, Interruption(timeout=config.rank_timeout))
    for logger in loggers:
        keep_logging(logger, policy)
        logger.log_hyperparams(hyperparameters(config, named=config.logged_env))
    folder = Path(config.output_dir)
    with closing(loggers), memory_explained(config, sizes, folder), ending(trainer, folder):
        with deferred(tell_processes(trainer)):
            trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        finish(trainer, module, data, folder)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    report = module.compute.compute()
    if trainer.is_global_zero:
        print_summary(report, metrics, folder)
        if text := data.quarantine.summary() or images.quarantine.summary():
            print(text)
    return metrics


if __name__ == "__main__":
    run(train, "train")
