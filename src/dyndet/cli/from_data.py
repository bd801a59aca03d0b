"""What a configuration leaves to the training set: keys that are null become numbers once the data is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from dyndet.data.box_sizes import anchor_scale, base_range, box_shapes, clustered_anchors, reaches
from dyndet.data.datamodule import DetectionDataModule


def follow_data(config: DictConfig, data: DetectionDataModule) -> str:
    """Fills in, where they are null, level ranges or anchors of the predictor and, with `follow` in the configuration,
    `trainer.max_epochs` and `trainer.check_val_every_n_epoch`.

    Args:
        config: of a training run; numbers that it gives stay.
        data: set up for training.

    Returns:
        A line that says what was chosen and by which key to choose otherwise; empty where nothing was.

    Raises:
        DataError: if there are too few boxes to make anchors of.
    """
    chosen = [text for text in (_sizes(config, data), _length(config, data)) if text]
    return f"follows the training set: {'; '.join(chosen)}" if chosen else ""


def _sizes(config: DictConfig, data: DetectionDataModule) -> str:
    predictor: Any = config.get("predictor")
    asked = [(key, fit) for key, fit in _FITS.items() if _is_null(predictor, key)]
    if not asked:
        return ""
    strides = [int(stride) for stride in config.backbone.get("strides") or (8, 16, 32)]
    strides += [strides[-1] * 2 ** (more + 1) for more in range(config.neck.get("extra_levels") or 0)]
    shapes = box_shapes(data.train, data.val_transform)
    texts = []
    for key, fit in asked:
        value = fit(shapes, strides, predictor)
        OmegaConf.update(predictor, key, value)
        texts.append(f"predictor.{key}={value:g}" if isinstance(value, float) else f"predictor.{key}={value}")
    sides = ""
    if len(shapes):
        low, middle, high = (shapes.amax(1).quantile(share).item() for share in (0.1, 0.5, 0.9))
        sides = f" (objects of {middle:.0f} px, most in {low:.0f}..{high:.0f})"
    return f"{'; '.join(texts)}{sides}"


def _is_null(config: Any, key: str) -> bool:
    """Whether a key is there without a value."""
    *path, name = key.split(".")
    for part in path:
        config = config.get(part) if OmegaConf.is_dict(config) else None
    return OmegaConf.is_dict(config) and name in config and config[name] is None


def _anchor_base(shapes: Tensor, strides: Sequence[int], predictor: Any) -> float:
    grid = predictor.anchors
    ratios = list(grid.get("ratios") or (0.5, 1.0, 2.0))
    return anchor_scale(shapes, strides, per_octave=grid.get("per_octave") or 3, ratios=ratios)


def _rpn_scales(shapes: Tensor, strides: Sequence[int], predictor: Any) -> list[float]:
    return [anchor_scale(shapes, strides, per_octave=1, ratios=list(predictor.rpn.anchors.ratios))]


_FITS: dict[str, Callable[[Tensor, Sequence[int], Any], Any]] = {
    "assigner.base_range": lambda shapes, strides, predictor: base_range(reaches(shapes), strides),  # FCOS
    "scale": lambda shapes, strides, predictor: anchor_scale(shapes, strides, per_octave=1, ratios=[1.0]),  # ATSS
    "anchors.base": _anchor_base,  # RetinaNet, FreeAnchor
    "rpn.anchors.scales": _rpn_scales,
    "anchors": lambda shapes, strides, predictor: clustered_anchors(shapes, len(strides)),  # YOLO
}
"""Keys of predictors and what they become."""


def _length(config: DictConfig, data: DetectionDataModule) -> str:
    follow, trainer = config.get("follow"), config.trainer
    if follow is None or trainer.max_epochs is not None or trainer.max_steps != -1:
        return ""
    batches = max(1, len(data.train) // (data.batch_size * _processes(trainer)))
    each = math.ceil(batches / trainer.get("accumulate_grad_batches", 1))
    least, most = follow.steps
    steps = min(max(follow.epochs * each, least), most)
    trainer.max_epochs = math.ceil(steps / each)
    if trainer.check_val_every_n_epoch is None and trainer.val_check_interval is None:
        trainer.check_val_every_n_epoch = max(1, trainer.max_epochs // follow.validations)
    return f"trainer.max_epochs={trainer.max_epochs} of {each} steps"


def _processes(trainer: Any) -> int:
    """How many a trainer will have, as far as its configuration says: devices by number, names, or all there are."""
    devices = trainer.get("devices", 1)
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if devices in ("auto", -1):
        devices = 1 if trainer.get("accelerator") == "cpu" else max(torch.cuda.device_count(), 1)
    if isinstance(devices, str):
        devices = [name for name in devices.split(",") if name.strip()]
    return max(devices if isinstance(devices, int) else len(devices), 1) * trainer.get("num_nodes", 1)
