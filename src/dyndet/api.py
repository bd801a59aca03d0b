"""The Python entrance: experiments and checkpoints as detectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from omegaconf import OmegaConf
from torch import nn

from dyndet.checkpoints.read import Checkpoint, read_checkpoint, take_weights
from dyndet.cli.compose import build, compose_experiment
from dyndet.errors import UserError
from dyndet.models.detectors.base import Detector, SwitchableHead
from dyndet.models.fuse import fused
from dyndet.ops.sparse.backend import Impl
from dyndet.speeds.set import Calibration, set_speed


def build_detector(experiment: str | None = None, overrides: Sequence[str] = ()) -> Detector:
    """The detector of an experiment, with random weights unless a local file is named. Never downloads.

    Args:
        experiment: a name under `conf/experiment`, for instance "fcos_d8_dyn"; None takes the defaults.
        overrides: Hydra overrides, for instance ["head.depth=4", "neck.extra_source=P5"].

    Raises:
        UserError: on an unknown experiment or key, or values that do not fit.
    """
    config = compose_experiment(experiment, overrides)
    if config.backbone.get("weights") == "timm":
        config.backbone.weights = "none"
    if OmegaConf.select(config, "data.num_classes", throw_on_missing=False) is None and "num_classes" in config.data:
        what = "the defaults" if experiment is None else experiment
        raise UserError(f'{what}: the number of classes comes from the data: add overrides=["data.num_classes=N"]')
    return build(config.detector).eval()


def load_detector(
    checkpoint: str | Path,
    *,
    impl: str | None = None,
    speed: str | None = None,
    fuse: bool = False,
    trust: bool = False,
) -> Detector:
    """A trained detector, in eval mode.

    Args:
        checkpoint: written by `dyndet.train` or `dyndet.convert`.
        impl: execution of the sparse operations ("auto", "dense", "gather", "triton"); None keeps the experiment's.
        speed: for instance "macs:60e9" or "easy", see `dyndet.speeds.set`; None leaves it as trained.
        fuse: fold norms and parallel branches into convolutions where a part can (YOLO); it computes the same, faster,
            and cannot train.
        trust: build whatever the file names, which can run any code: your own parts, say.

    Raises:
        UserError: if the file is not a checkpoint of ours, names other parts than ours and is not trusted, has no
            sparse operations to run by `impl`, or cannot run at this speed.
    """
    return detector_from(read_checkpoint(checkpoint, trust=trust), impl=impl, speed=speed, fuse=fuse)


def detector_from(
    saved: Checkpoint, *, impl: str | None = None, speed: str | None = None, fuse: bool = False
) -> Detector:
    """`load_detector` for a checkpoint that has been read already."""
    config = saved.config
    detector: Detector = build(config.detector)
    if impl is not None:
        _execute(detector, impl)
    take_weights(detector, saved.weights)
    if config.channels_last:  # as in training, so that the numbers are the same to the last bit
        nn.Module.to(detector, memory_format=torch.channels_last)
    if speed is not None:
        set_speed(detector, speed, None if saved.calibration is None else Calibration.of(saved.calibration))
    return fused(detector) if fuse else detector.eval()


def _execute(detector: Detector, impl: str) -> None:
    """Sets the execution of all sparse operations."""
    heads = [module for module in detector.modules() if isinstance(module, SwitchableHead)]
    if not heads:
        raise UserError(f"impl={impl}: this detector's head has no sparse operations")
    try:
        for head in heads:
            head.execute(cast(Impl, impl))
    except ValueError as error:
        raise UserError(f"impl={impl}: {error}") from error
