"""A released checkpoint as an experiment of ours with its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from dyndet.api import detector_from
from dyndet.checkpoints.read import Checkpoint
from dyndet.cli.compose import build, compose_experiment
from dyndet.convert import cbnet, cvpods, detectron2, dynamicdet, mmdet
from dyndet.convert.coco_categories import categories_for
from dyndet.convert.engine import Report, apply_rules
from dyndet.convert.pixels import pixel_settings
from dyndet.convert.recipe import FILLS, Recipe
from dyndet.convert.source import read_source
from dyndet.errors import UserError, WriteError
from dyndet.models.detectors.base import Detector
from dyndet.sealed import write_sealed
from dyndet.structures import Category

SOURCES = (cbnet, mmdet, cvpods, detectron2, dynamicdet)
"""In the order in which they are asked whether a file is theirs."""

_ABSENT = object()


@dataclass(frozen=True)
class Converted:
    """A release in our terms.

    Attributes:
        experiment: the name.
        overrides: Hydra overrides that make the experiment this release; `build_detector(experiment, overrides)` takes
            the weights.
        config: the experiment with these overrides.
        state_dict: weights, by our names.
        categories: label k is `categories[k]`.
        report: what became of every tensor.
        source: the `NAME` of one of `SOURCES`.
        note: what no tensor tells and the user may have to, and what its publishers ask of users.
    """

    experiment: str
    overrides: list[str]
    config: DictConfig
    state_dict: dict[str, Tensor]
    categories: list[Category]
    report: Report
    source: str
    note: str = ""


def load_release(
    path: str | Path,
    experiment: str = "auto",
    *,
    trust: bool = False,
    impl: str | None = None,
    speed: str | None = None,
    fuse: bool = False,
) -> Detector:
    """A released detector with its weights and all that its experiment sets otherwise, in eval mode.

    What its labels mean is in `read_release(path).categories`.

    Args:
        path: as `read_release`, likewise `experiment` and `trust`.
        impl: as `dyndet.load_detector`, likewise `speed` (a release has no calibration) and `fuse`.

    Raises:
        UserError: as `read_release` and `dyndet.load_detector`.
    """
    converted = read_release(path, experiment, trust=trust)
    checkpoint = Checkpoint(converted.config, converted.categories, converted.state_dict)
    return detector_from(checkpoint, impl=impl, speed=speed, fuse=fuse)


def read_release(path: str | Path, experiment: str = "auto", *, trust: bool = False) -> Converted:
    """Reads a released checkpoint.

    Args:
        path: a file of mmdetection, CBNetV2, detectron2, cvpods, DynamicDet or YOLOv7.
        experiment: a name under `conf/experiment`; "auto" takes what the tensors and the file's meta data say.
        trust: see `read_source`.

    Raises:
        UserError: if the file cannot be read, is of no known source, or does not fit the experiment.
    """
    source = read_source(path, trust=trust is True)
    shapes = source.shapes
    module = next((module for module in SOURCES if module.recognise(shapes)), None)
    if module is None:
        names = ", ".join(list(shapes)[:3])
        known = ", ".join(module.NAME for module in SOURCES)
        raise UserError(f"{path} is of no source that dyndet knows ({known}): it has {names}")
    try:
        recipe = module.recipe(source)
    except (KeyError, IndexError, ZeroDivisionError) as error:  # a tensor that says what the release is
        raise UserError(f"{path} ({module.NAME}) lacks a part of its head or holds it damaged: {error}") from error
    name = recipe.experiment if experiment == "auto" else experiment
    config = compose_experiment(name, recipe.options)
    if "weights" in config.backbone:
        config.backbone.weights = "none"
    known = {key: recipe.settings.get(key, _current(config, key)) for key in ("preprocess.mean", "preprocess.std")}
    pixels, remarks = pixel_settings(source, known)
    recipe = replace(recipe, settings={**recipe.settings, **pixels}, remarks=[*recipe.remarks, *remarks])
    overrides = [*recipe.options, *_adapt(config, recipe, source.path)]
    with torch.device("meta"):
        expected = build(config.detector).state_dict()
    what = f"{path} ({module.NAME}) does not fit {name}"
    weights, report = apply_rules(source.weights, recipe.rules, expected, fills=FILLS, what=what)
    return Converted(
        experiment=name,
        overrides=overrides,
        config=config,
        state_dict=weights,
        categories=categories_for(recipe.num_classes, recipe.names),
        report=report,
        source=module.NAME,
        note="; ".join([*([recipe.note] if recipe.note and experiment == "auto" else []), *recipe.remarks]),
    )


def save_release(converted: Converted, out: str | Path) -> Path:
    """Writes a checkpoint that `load_detector` and the commands take as `ckpt`.

    Raises:
        UserError: if it cannot be written.
    """
    out = Path(out)
    categories = [{"id": category.id, "name": category.name} for category in converted.categories]
    content = {
        "dyndet": {"config": OmegaConf.to_container(converted.config), "categories": categories},
        "state_dict": {f"detector.{name}": value.contiguous() for name, value in converted.state_dict.items()},
    }
    try:
        write_sealed(content, out)
    except WriteError as error:
        raise UserError(f"out={error}") from error
    return out


def _adapt(config: DictConfig, recipe: Recipe, path: Path) -> list[str]:
    """Sets in a composed experiment what a release does otherwise; returns that as overrides."""
    overrides = []
    for key, value in {"data.num_classes": recipe.num_classes, **recipe.settings}.items():
        current = _current(config, key)
        if current is _ABSENT:
            raise UserError(
                f"{path} is a release of {recipe.experiment}, not of {config.name}: that has no {key}; "
                "leave experiment=auto"
            )
        if not _same(current, value):
            OmegaConf.update(config, key, value, merge=False)
            overrides.append(f"{key}={_text(value)}")
    return overrides


def _current(config: DictConfig, key: str) -> Any:
    value = OmegaConf.select(config, key, default=_ABSENT)
    if key == "backbone.name" and isinstance(value, str):
        return value.partition(".")[0]  # "resnet50.tv_in1k": which weights it would start from does not matter here
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _same(current: Any, wanted: Any) -> bool:
    if isinstance(current, list) and isinstance(wanted, list):
        return len(current) == len(wanted) and all(map(math.isclose, current, wanted))
    return current == wanted


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
