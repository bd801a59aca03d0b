"""The configurations named after a code base choose the conventions that the code base has."""

from __future__ import annotations

from typing import Any

import pytest

from dyndet.cli.compose import build, compose_experiment

FIELDS: dict[str, str] = {
    "offset": "anchors.offset",
    "order": "anchors.order",
    "std": "coder.std",
    "clamp": "coder.clamp",
    "kernel": "cls.kernel_size",
    "mode": "normaliser.mode",
    "start": "normaliser.average",
    "floor": "box_normaliser_min",
    "padding": "ignore_padding",
    "divisor": "valid_divisor",
    "threshold": "postprocess.score_threshold",
    "topk": "postprocess.topk",
    "nms": "postprocess.iou_threshold",
    "most": "postprocess.max_detections",
    "rank": "postprocess.rank",
    "clip": "postprocess.clip",
    "beta": "beta",
    "point": "point_offset",
    "score": "score",
    "on": "centerness_on",
    "activation": "box_activation",
    "loss": "box_loss",
    "weighting": "box_weighting",
    "radius": "assigner.radius",
    "strict": "assigner.strict",
    "base": "assigner.base_range",
}
STD = [0.1, 0.1, 0.2, 0.2]
MMDET = {"padding": False, "rank": "probability", "clip": "before", "threshold": 0.05, "topk": 1000, "most": 100}

PRESETS: dict[str, dict[str, Any]] = {
    "atss_mmdet": {
        **MMDET, "offset": 0.0, "kernel": (3, 3), "mode": "images", "floor": 1.0, "divisor": 128, "nms": 0.6,
        "std": STD,
    },
    "atss_reproduction": {
        **MMDET, "offset": 0.5, "kernel": (1, 1), "mode": "images", "floor": 1.0, "divisor": 128, "nms": 0.6,
        "std": STD,
    },
    "atss_official": {
        "padding": False, "divisor": None, "offset": 0.5, "kernel": (1, 1), "mode": "total", "floor": 0.0, "nms": 0.6,
        "rank": "score", "clip": "after", "std": STD,
    },
    "retinanet_mmdet": {
        **MMDET, "offset": 0.0, "order": "scale", "clamp": "both", "mode": "images", "beta": 0.0, "divisor": 128,
        "nms": 0.5, "std": [1.0] * 4,
    },
    "retinanet_detectron2": {
        "padding": False, "divisor": None, "offset": 0.0, "order": "ratio", "clamp": "upper", "mode": "ema",
        "start": 100.0, "beta": 0.0, "nms": 0.5, "clip": "after", "std": [1.0] * 4,
    },
    "freeanchor": {"offset": 0.0, "order": "scale", "beta": 0.11, "nms": 0.5, "divisor": None, "std": STD},
    "fcos_mmdet": {
        **MMDET, "point": 0.5, "floor": 1e-6, "score": "product", "on": "reg", "activation": "relu", "loss": "giou",
        "weighting": "centerness", "radius": 1.5, "strict": False, "mode": "total", "nms": 0.6, "base": 64,
    },
    "fcos_mmdet_plain": {
        **MMDET, "point": 0.5, "floor": 1e-6, "score": "product", "on": "cls", "activation": "exp", "loss": "iou",
        "weighting": "centerness", "radius": None, "strict": False, "mode": "total", "nms": 0.5, "base": 64,
    },
    "fcos_detectron2": {
        "padding": False, "point": 0.5, "score": "sqrt", "activation": "relu", "loss": "giou", "weighting": "uniform",
        "radius": 1.5, "strict": True, "mode": "ema", "start": 300.0, "threshold": 0.2, "nms": 0.6, "base": 64,
        "clip": "after",
    },
}  # fmt: skip


def read(module: object, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    if hasattr(module, "item"):
        return module.item()  # type: ignore[attr-defined]
    return list(module) if path == "coder.std" else module  # type: ignore[call-overload]


@pytest.mark.parametrize("name", PRESETS)
def test_preset(name: str) -> None:
    config = compose_experiment(None, [f"predictor={name}", "preprocess.pad_multiple=128"])
    predictor = build(config.predictor)(channels=8, strides=[8, 16, 32])
    found = {key: read(predictor, FIELDS[key]) for key in PRESETS[name]}
    assert found == PRESETS[name]


def test_detectron2_has_no_level_scales() -> None:
    config = compose_experiment(None, ["predictor=fcos_detectron2"])
    assert build(config.predictor)(channels=8, strides=[8, 16, 32]).scales is None
