"""What a configuration leaves to the training set: keys that are null become numbers once the data is known."""

from __future__ import annotations

import math
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dyndet.data.box_sizes import base_range, reaches
from dyndet.data.datamodule import DetectionDataModule


def follow_data(config: DictConfig, data: DetectionDataModule) -> str:
    """Fills in, where they are null, `predictor.assigner.base_range` and, with `follow` in the configuration,
    `trainer.max_epochs` and `trainer.check_val_every_n_epoch`.

    Args:
        config: of a training run; numbers that it gives stay.
        data: set up for training.

    Returns:
        A line that says what was chosen and by which key to choose otherwise; empty where nothing was.
    """
    chosen = [text for text in (_level_ranges(config, data), _length(config, data)) if text]
    return f"follows the training set: {'; '.join(chosen)}" if chosen else ""


def _level_ranges(config: DictConfig, data: DetectionDataModule) -> str:
    assigner: Any = OmegaConf.select(config, "predictor.assigner")
    if not OmegaConf.is_config(assigner) or "base_range" not in assigner or assigner.base_range is not None:
        return ""
    strides = [int(stride) for stride in config.backbone.get("strides") or (8, 16, 32)]
    strides += [strides[-1] * 2 ** (more + 1) for more in range(config.neck.get("extra_levels") or 0)]
    reach = reaches(data.train, data.val_transform)
    assigner.base_range = base_range(reach, strides)
    sides = ""
    if len(reach):
        low, middle, high = (2 * reach.quantile(share).item() for share in (0.1, 0.5, 0.9))
        sides = f" (objects of {middle:.0f} px, most in {low:.0f}..{high:.0f})"
    return f"predictor.assigner.base_range={assigner.base_range:g}{sides}"


def _length(config: DictConfig, data: DetectionDataModule) -> str:
    follow, trainer = config.get("follow"), config.trainer
    if follow is None or trainer.max_epochs is not None or trainer.max_steps != -1:
        return ""
    batches = max(1, len(data.train) // data.batch_size)
    least, most = follow.steps
    steps = min(max(follow.epochs * batches, least), most)
    trainer.max_epochs = math.ceil(steps / batches)
    if trainer.check_val_every_n_epoch is None and trainer.val_check_interval is None:
        trainer.check_val_every_n_epoch = max(1, trainer.max_epochs // follow.validations)
    return f"trainer.max_epochs={trainer.max_epochs} of {batches} steps"
