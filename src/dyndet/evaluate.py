"""`python -m dyndet.evaluate ckpt=FILE [speed=easy] [latency=16] [timing=8] [data.root=FOLDER ...]`: AP, compute.

`latency=16` times sixteen images one by one; `timing=8` times the head on eight batches against the fixed head, which
is the same without gates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import cast

from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf

from dyndet.api import detector_from
from dyndet.checkpoints.changes import check_classes
from dyndet.checkpoints.read import read_checkpoint
from dyndet.cli.command import run
from dyndet.cli.compose import build, fill
from dyndet.cli.out_of_memory import advice, explained
from dyndet.data.datamodule import DetectionDataModule
from dyndet.errors import UserError
from dyndet.lightning.callbacks import Progress
from dyndet.lightning.collect import Collect
from dyndet.lightning.detection import DetectionModule
from dyndet.lightning.halving import Sizes
from dyndet.lightning.interruption import leave_signals_alone
from dyndet.metrics.compute import ComputeReport
from dyndet.models.detectors.base import Detector, TwinnedHead, routed_part
from dyndet.models.detectors.dynamic import DynamicDetector
from dyndet.models.detectors.pyramid import PyramidDetector
from dyndet.report.summary import print_summary
from dyndet.speeds.set import route_settings
from dyndet.speeds.timing import device_name, time_detections, time_head


def evaluate(config: DictConfig) -> dict[str, float]:
    """Validates a checkpoint on its data and returns the metrics, as training would have printed them."""
    saved = read_checkpoint(config.ckpt, trust=config.trust)
    if config.data.batch_size is not None:
        saved.config.data.val_batch_size = None  # there is one batch size here
    fill(saved.config.data, config.data, "data")
    if "num_classes" in saved.config.data.module:
        saved.config.data.module.num_classes = None  # other categories are named below
    data = build(saved.config.data.module)
    data.quarantine.keep(config.output_dir)
    data.setup("validate")
    check_classes(config.ckpt, saved.categories, data.categories)
    detector = detector_from(saved, impl=config.impl, speed=config.speed, fuse=config.fuse)
    head = routed_part(detector.head) if isinstance(detector, PyramidDetector) else None
    if config.timing and not isinstance(head, TwinnedHead):
        raise UserError(f"timing={config.timing}: this detector's head has no fixed twin to compare its time with")
    module = DetectionModule(detector, categories=data.categories)
    folder = Path(config.output_dir)
    collected = Collect(folder, masks=True)
    precision = config.trainer.precision or saved.config.trainer.precision
    if OmegaConf.is_config(precision):  # the trainer would build it, and of a file's trainer nothing is checked
        raise UserError(f"{config.ckpt}: trainer.precision must be a word or a number: set trainer.precision=32-true")
    config.trainer.precision = precision
    trainer: Trainer = build(config.trainer, callbacks=[Progress(), collected, sizes := Sizes("evaluation")])
    leave_signals_alone(trainer)
    with explained(sizes.work, lambda: advice(data.val_batch_size, "trainer.accelerator=cpu")):
        trainer.validate(module, data, verbose=False)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    report = module.compute.compute()
    if trainer.is_global_zero:
        print_summary(report, metrics)
        module.to(trainer.strategy.root_device)  # Lightning leaves it on the CPU
        if config.latency:
            metrics |= _latency(detector, data, config.latency)
        if config.timing:
            metrics |= _compare(cast(PyramidDetector, detector), data, config, report)
        print(f"validation steps took {collected.seconds:.2f} s for {collected.images} images")
        if text := data.quarantine.summary():
            print(f"{text}; the figures are of the other {collected.images} images")
        print(f"detections: {folder / 'detections.json'}, ground truth and compute of every image beside it")
        finite = {key: value for key, value in metrics.items() if math.isfinite(value)}  # json has no nan
        (folder / "result.json").write_text(json.dumps(finite, indent=1) + "\n")
    return metrics


def _latency(detector: Detector, data: DetectionDataModule, count: int) -> dict[str, float]:
    """Prints how long single images take, of two routes both ends as well; returns it as metrics."""
    images = data.single_images(count)
    settings: dict[str, Callable[[], None]] = {"now": lambda: None}
    if isinstance(detector, DynamicDetector) and detector.router is not None:
        settings = route_settings(detector)
    times = time_detections(detector.eval(), images, settings)
    settings["now"]()
    ends = f"; all easy {times['easy']:.2f}, all hard {times['hard']:.2f}" if "easy" in times else ""
    print(f"latency: {times['now']:.2f} ms per image, {len(images)} images one by one on {device_name(detector)}{ends}")
    return {f"time/latency_{name}_ms".replace("_now", ""): value for name, value in times.items()}


def _compare(
    detector: PyramidDetector, data: DetectionDataModule, config: DictConfig, report: ComputeReport
) -> dict[str, float]:
    """Prints the head's time against that of its fixed twin, next to its multiply-adds; returns it as a metric."""
    impl = config.impl or "auto"
    timing = time_head(detector.eval(), islice(data.val_dataloader(), config.timing), impl=impl)
    computed = report.executed / report.full.mean
    print(f"head: open gates use {report.ratio:.1%} of its full MACs, {computed:.1%} are computed, in "
          f"{timing.ratio:.1%} of the time of the fixed head (impl={impl}, {timing.batches} batches)")  # fmt: skip
    return {"time/head_ratio": timing.ratio}


if __name__ == "__main__":
    run(evaluate, "evaluate")
