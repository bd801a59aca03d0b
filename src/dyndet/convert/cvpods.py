"""cvpods: the FCOS models of the fine-grained head's authors.

| release | known by |
| --- | --- |
| dynamic D4, D8 | `head.cls_subnet.N.dynamic_convs`; its depth is the number of nodes |
| fixed D4, D8 | `head.cls_subnet.N.depth_module` without gates |
| plain FCOS ("D2") | `head.cls_subnet.0.weight` and `head.centerness` |

Backbone and FPN are called as in detectron2, on which cvpods builds. The ResNet is MSRA's: blue first, mean colour
only, stride in the 1x1. Gates (tau 1.5), norms at inference (over executed positions) and points (corners of cells)
follow the experiment and the published mode, which no tensor tells; nor do they tell the weight of the budget, so that
the three dynamic D8 releases all become `fcos_d8_dyn`. Detections are selected as published: a level has no more
candidates than locations, and boxes are cut to the image after NMS.
"""

from __future__ import annotations

from typing import Any

from dyndet.convert.detectron2 import RESNET, dense_rules, fpn_rules, resnet_settings
from dyndet.convert.engine import Rule, drop
from dyndet.convert.recipe import COUNTERS, Recipe, Shapes, count, has
from dyndet.convert.source import Source

NAME = "cvpods"

_SUBNET = r"head\.(?:cls|bbox)_subnet\.(\d+)\."
_DROPPED = (
    COUNTERS,
    drop(r"pixel_(mean|std)", "taken over by preprocess"),
    drop(r"shift_generator\..+", "points follow from the experiment"),
)


def _branch(source: str, target: str) -> list[Rule]:
    """One branch of nodes, gated or fixed. Scale path 0 comes from the finer level, path 1 from the coarser one."""
    node, ours = rf"head\.{source}\.(\d+)\.", rf"head.{target}.\1"
    rules = [
        Rule(node + r"(scale_weight|output_weight)", rf"{ours}.\2"),
        Rule(node + r"depth_module\.bottleneck\.conv([12])\.weight", rf"{ours}.depth.conv\2.weight"),
        Rule(node + r"depth_module\.bottleneck\.conv([12])\.norm\.(.+)", rf"{ours}.depth.norm\2.\3"),
        Rule(node + r"depth_module\.gate\.gate_conv\.(.+)", rf"{ours}.gates.depth.conv.\2"),
    ]
    for index, path in enumerate(("down", "up")):
        gated, fixed = rf"dynamic_convs\.{index}\.convs\.", rf"convs\.{index}\."
        rules += [
            Rule(node + rf"(?:{gated}|{fixed})0\.(.+)", rf"{ours}.{path}.conv.\2"),
            Rule(node + rf"(?:{gated}|{fixed})1\.(.+)", rf"{ours}.{path}.norm.\2"),
            Rule(node + rf"dynamic_convs\.{index}\.gate\.gate_conv\.(.+)", rf"{ours}.gates.{path}.conv.\2"),
        ]
    return rules


def recognise(shapes: Shapes) -> bool:
    """Whether names are those of a cvpods FCOS."""
    return has(shapes, r"backbone\.bottom_up\.") and has(shapes, r"head\.cls_subnet\.") and has(shapes, r"head\.center")


def recipe(source: Source) -> Recipe:
    """The experiment of a release."""
    shapes = source.shapes
    settings: dict[str, Any] = resnet_settings(shapes) | {
        "predictor.ignore_padding": False,
        "predictor.postprocess.clip": "after",
        "predictor.postprocess.candidates": "locations",
    }
    note = ""
    depth = count(shapes, _SUBNET + "depth_module")
    if has(shapes, _SUBNET + "dynamic_convs"):
        experiment = "fcos_d8_dyn"
        settings |= {"head.depth": depth, "head.norm_stats": "published"}
        note = "no tensor tells the budget's weight, which only matters for further training: set experiment=NAME"
    elif depth:
        experiment = "fcos_d8"
        settings |= {"head.depth": depth, "head.ignore_padding": False}
    else:
        experiment = "fcos_r50"
        settings["head.ignore_padding"] = False
    rules = [
        *_DROPPED,
        *RESNET,
        *fpn_rules(shapes),
        *_branch("cls_subnet", "cls"),
        *_branch("bbox_subnet", "reg"),
        *dense_rules("head"),
    ]
    return Recipe(experiment, rules, shapes["head.cls_score.weight"][0], settings, note=note)
