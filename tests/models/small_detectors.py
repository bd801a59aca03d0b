"""Small detectors of every head and predictor, built in a blink, and something to train them on."""

from __future__ import annotations

from functools import cache

import torch
from omegaconf import DictConfig, OmegaConf

from dyndet.cli.compose import build, compose_experiment
from dyndet.models.detectors.dense import assemble_dense
from dyndet.models.detectors.pyramid import PyramidDetector
from dyndet.models.detectors.two_stage import assemble_two_stage
from dyndet.structures import Target

HEADS = [
    "plain_small", "fixed_small", "fine_grained_small", "coarse_small", "dyhead_small", "dyhead_towers_small",
    "dyhead_fine_grained_small", "separable_small", "none",
]  # fmt: skip
ONE_STAGE = ["fcos_small", "atss_small", "retinanet_small", "freeanchor_small", "yolo_p5_small"]
TWO_STAGE = ["faster_rcnn_small", "cascade_rcnn", "mask_rcnn_small"]
SMALL = [
    "neck.channels=16", "head.depth=1", "head.num_blocks=1", "head.num_convs=1", "head.towers.depth=1",
    "predictor.roi.head.hidden=16", "predictor.roi.box.head.hidden=16", "predictor.rpn.max_proposals=20",
]  # fmt: skip


@cache
def config(choice: str) -> DictConfig:
    """The configuration with one part exchanged, by overrides, and small where it can be."""
    whole = compose_experiment(None, choice.split())
    for key, value in (item.split("=") for item in SMALL):
        if OmegaConf.select(whole, key) is not None:
            OmegaConf.update(whole, key, int(value))
    return whole


def tiny(head: str, predictor: str) -> PyramidDetector:
    """Of parts that wait for their width, so that not every pair has to be composed; in training mode.

    The head's name may be followed by overrides.
    """
    rest = config(f"predictor={predictor}")
    parts = {name: build(rest[name]) for name in ("preprocess", "backbone", "neck")}
    parts["head"] = build(config(f"head={head}").head)
    if predictor in TWO_STAGE:
        return assemble_two_stage(rpn=build(rest.predictor.rpn), predictor=build(rest.predictor.roi), **parts).train()
    return assemble_dense(predictor=build(rest.predictor), **parts).train()


def targets(count: int) -> list[Target]:
    """Of two images of 64 pixels, the second of which is empty."""
    boxes = torch.tensor([[4.0, 6, 26, 30], [34, 30, 60, 58]])[:count]
    masks = torch.zeros(count, 64, 64, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = True
    labels = torch.arange(count)
    nothing = torch.zeros(0, dtype=torch.bool)
    return [
        Target(boxes, labels, labels < 0, masks),
        Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), nothing, torch.zeros(0, 64, 64, dtype=torch.bool)),
    ]
