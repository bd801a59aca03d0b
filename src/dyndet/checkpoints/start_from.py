"""Weights to start training from: another run's, or a converted release's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from torch import nn

from dyndet.checkpoints.read import read_checkpoint
from dyndet.errors import UserError


def start_from(detector: nn.Module, path: str | Path, config: DictConfig) -> str:
    """Fills a detector with what fits of a checkpoint, and says what starts anew: layers of another number of classes,
    a head of another kind.

    Args:
        detector: to fill.
        path: written by `dyndet.train` or `dyndet.convert`.
        config: the experiment of the detector; its `trust` is for the file.

    Raises:
        UserError: if the file is no checkpoint, its backbone is another one, or it was trained on other pixels.
    """
    saved = read_checkpoint(path, key="init", trust=config.trust)
    expected = detector.state_dict()
    fits = {
        key: value for key, value in saved.weights.items() if key in expected and value.shape == expected[key].shape
    }
    anew = [key for key in expected if key not in fits]
    lost = [key for key in anew if "backbone" in key.split(".")]
    theirs = saved.config.get("name", "?")
    if lost:
        raise UserError(
            f"init={path} holds {theirs}, whose backbone is not that of {config.name}: {len(lost)} tensors do not fit, "
            f"such as {lost[0]}"
        )
    pixels = saved.config.preprocess
    for key in ("mean", "std", "bgr"):
        if not np.allclose(pixels[key], config.preprocess[key]):
            raise UserError(
                f"init={path} was trained with preprocess.{key}={pixels[key]}, this experiment has "
                f"{config.preprocess[key]}: add 'preprocess.{key}={pixels[key]}' to the command"
            )
    detector.load_state_dict({**expected, **fits})
    parts = Counter(".".join(key.split(".")[:2]) for key in anew)
    rest = f"; anew: {', '.join(f'{part} ({count})' for part, count in parts.items())}" if anew else ""
    return f"init: {len(fits)} of {len(expected)} tensors from {path} ({theirs}){rest}"
