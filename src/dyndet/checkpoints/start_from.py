"""Weights to start training from: another run's, or a converted release's."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from dyndet.checkpoints.read import read_checkpoint
from dyndet.cli.compose import build
from dyndet.errors import UserError
from dyndet.structures import Category


def train_random_layers(config: DictConfig) -> str:
    """Freezes nothing of a backbone that starts random, in place, and says so; empty where weights are given.

    `backbone.frozen_stages` is for layers that know something: random ones would stay random.
    """
    weights, stages = (OmegaConf.select(config, f"backbone.{key}") for key in ("weights", "frozen_stages"))
    if config.init is not None or str(weights) != "none" or stages is None or stages < 0:
        return ""
    config.backbone.frozen_stages = -1
    return "backbone.weights=none: the backbone starts random, so all of it trains (backbone.frozen_stages=-1)"


def start_from(
    detector: nn.Module, path: str | Path, config: DictConfig, categories: Sequence[Category] | None = None
) -> str:
    """Fills a detector with what fits of a checkpoint, and says what starts anew: layers of other classes, a head of
    another kind.

    Args:
        detector: to fill.
        path: written by `dyndet.train` or `dyndet.convert`.
        config: the experiment of the detector; its `trust` is for the file.
        categories: of the data. Where their names are not those of the checkpoint, in this order, all layers that
            depend on the number of classes start anew.

    Raises:
        UserError: if the file is no checkpoint, its backbone is another one, or it was trained on other pixels.
    """
    saved = read_checkpoint(path, key="init", trust=config.trust)
    expected = detector.state_dict()
    fits = {
        key: value for key, value in saved.weights.items() if key in expected and value.shape == expected[key].shape
    }
    names, theirs = ([item.name for item in items or ()] for items in (categories, saved.categories))
    other = bool(names) and names != theirs
    if other and len(names) == len(theirs):
        classes = _of_classes(detector, config)
        fits = {key: value for key, value in fits.items() if key not in classes}
    anew = [key for key in expected if key not in fits]
    lost = [key for key in anew if "backbone" in key.split(".")]
    experiment = saved.config.get("name", "?")
    if lost:
        raise UserError(
            f"init={path} holds {experiment}, whose backbone is not that of {config.name}: {len(lost)} tensors do not "
            f"fit, such as {lost[0]}"
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
    classes = " (other classes)" if other else ""
    rest = f"; anew{classes}: {', '.join(f'{part} ({count})' for part, count in parts.items())}" if anew else ""
    return f"init: {len(fits)} of {len(expected)} tensors from {path} ({experiment}){rest}"


def _of_classes(detector: nn.Module, config: DictConfig) -> set[str]:
    """Tensors whose shape depends on the number of classes: those that another number changes."""
    other = copy.deepcopy(config)
    other.data.num_classes += 1
    if "weights" in other.backbone:
        other.backbone.weights = "none"
    with torch.random.fork_rng(devices=[]):
        shapes = {name: value.shape for name, value in build(other.detector).state_dict().items()}
    return {name for name, value in detector.state_dict().items() if shapes.get(name) != value.shape}
