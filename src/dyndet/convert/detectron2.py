"""detectron2: the DyHead authors' models, and Faster R-CNN and RetinaNet without DyHead.

| release | known by |
| --- | --- |
| DyHead + ATSS R50, Swin-T | `dyhead_tower` and `head.cls_logits`; Swin-T has `bottom_up.patch_embed` |
| DyHead + RetinaNet R50, RetinaNet | `head.cls_score` and 9 anchors (36 box channels), with or without `dyhead_tower` |
| DyHead + Faster R-CNN R50, Faster R-CNN | `roi_heads.box_predictor`, with or without `dyhead_tower` |

Tensors do not tell the channel order, the place of a stride or the padding divisor: ResNets are taken for MSRA's (blue
first, mean colour only, stride in the 1x1), as all configurations of these releases have them. `pixel_mean` and
`pixel_std` are taken over where the file has them. Anchors are ordered and centred as the experiment says.
"""

from __future__ import annotations

from typing import Any

from dyndet.convert.engine import Rule, drop
from dyndet.convert.recipe import CAFFE, COUNTERS, Recipe, Shapes, count, has, resnet_name
from dyndet.convert.source import Source
from dyndet.convert.tensor_transforms import background_first
from dyndet.errors import UserError

NAME = "detectron2"

_PREFIX = r"backbone\.(?:backbone\.)?"  # DyHead wraps the FPN
_BODY = _PREFIX + r"bottom_up\."
_TOWER = r"backbone\.dyhead_tower\."
_DROPPED = (
    COUNTERS,
    drop(r".*anchor_generator\.cell_anchors\.\d+", "anchors follow from the experiment"),
    drop(r"pixel_(mean|std)", "taken over by preprocess"),
    drop(r".*\.attn\.relative_position_index", "follows from the window size"),
    drop(r".*\.attn_mask", "follows from the size of the map"),
)
RESNET = (
    Rule(_BODY + r"stem\.conv1\.weight", "backbone.body.conv1.weight"),
    Rule(_BODY + r"stem\.conv1\.norm\.(.+)", r"backbone.body.bn1.\1"),
    *(
        rule
        for stage in range(2, 6)
        for rule in (
            Rule(_BODY + rf"res{stage}\.(\d+)\.conv(\d)\.weight", rf"backbone.body.layer{stage - 1}.\1.conv\2.weight"),
            Rule(_BODY + rf"res{stage}\.(\d+)\.conv(\d)\.norm\.(.+)", rf"backbone.body.layer{stage - 1}.\1.bn\2.\3"),
            Rule(
                _BODY + rf"res{stage}\.(\d+)\.shortcut\.weight",
                rf"backbone.body.layer{stage - 1}.\1.downsample.0.weight",
            ),
            Rule(
                _BODY + rf"res{stage}\.(\d+)\.shortcut\.norm\.(.+)",
                rf"backbone.body.layer{stage - 1}.\1.downsample.1.\2",
            ),
        )
    ),
)
_SWIN = (
    Rule(_BODY + r"patch_embed\.(.+)", r"backbone.body.patch_embed.\1"),
    Rule(_BODY + r"layers\.(\d)\.blocks\.(.+)", r"backbone.body.layers_\1.blocks.\2"),
    # A stage's end here is the next one's start in timm; the order of merged channels is the same.
    *(
        Rule(_BODY + rf"layers\.{i}\.downsample\.(.+)", rf"backbone.body.layers_{i + 1}.downsample.\1")
        for i in range(3)
    ),
    *(Rule(_BODY + rf"norm{i + 1}\.(.+)", rf"backbone.output_norm.{i}.\1") for i in range(3)),
)
_TWO_STAGE = (
    Rule(r"proposal_generator\.rpn_head\.conv\.(.+)", r"rpn.network.head.conv.0.0.\1"),
    Rule(r"proposal_generator\.rpn_head\.objectness_logits\.(.+)", r"rpn.network.head.cls_logits.\1"),
    Rule(r"proposal_generator\.rpn_head\.anchor_deltas\.(.+)", r"rpn.network.head.bbox_pred.\1"),
    Rule(r"roi_heads\.box_head\.fc1\.(.+)", r"predictor.stage.box_head.layers.fc6.\1"),
    Rule(r"roi_heads\.box_head\.fc2\.(.+)", r"predictor.stage.box_head.layers.fc7.\1"),
    Rule(r"roi_heads\.box_predictor\.cls_score\.(.+)", r"predictor.stage.box_head.cls.\1", background_first),
    Rule(r"roi_heads\.box_predictor\.bbox_pred\.(.+)", r"predictor.stage.box_head.box.\1"),
)


def fpn_rules(shapes: Shapes) -> list[Rule]:
    """Laterals and outputs carry the number of their stage, the first is 3 or 2."""
    first = 2 if has(shapes, _PREFIX + "fpn_lateral2") else 3
    return [
        *(Rule(_PREFIX + rf"fpn_lateral{first + i}\.(.+)", rf"neck.lateral.{i}.\1") for i in range(4)),
        *(Rule(_PREFIX + rf"fpn_output{first + i}\.(.+)", rf"neck.output.{i}.\1") for i in range(4)),
        *(Rule(_PREFIX + rf"top_block\.p{6 + i}\.(.+)", rf"neck.extra.{i}.\1") for i in range(2)),
    ]


def dense_rules(towers: str) -> list[Rule]:
    """Towers are sequences of the same layers as ours."""
    return [
        Rule(r"head\.cls_subnet\.(\d+)\.(weight|bias)", rf"{towers}.cls.\1.\2"),
        Rule(r"head\.bbox_subnet\.(\d+)\.(weight|bias)", rf"{towers}.reg.\1.\2"),
        Rule(r"head\.cls_(?:logits|score)\.(.+)", r"predictor.cls.\1"),
        Rule(r"head\.bbox_pred\.(.+)", r"predictor.box.\1"),
        Rule(r"head\.centerness\.(.+)", r"predictor.centerness.\1"),
        Rule(r"head\.scales\.(\d+)\.scale", r"predictor.scales[\1]"),
    ]


def _dyhead(target: str) -> list[Rule]:
    block = _TOWER + r"(\d+)\."
    convs = {"0": "high", "1": "mid", "2": "low"}
    return [
        Rule(block + r"offset\.(.+)", rf"{target}.\1.offset.\2"),
        *(Rule(block + rf"DyConv\.{i}\.conv\.(.+)", rf"{target}.\1.{name}.\2") for i, name in convs.items()),
        *(Rule(block + rf"DyConv\.{i}\.bn\.(.+)", rf"{target}.\1.{name}.norm.\2") for i, name in convs.items()),
        Rule(block + r"AttnConv\.1\.(.+)", rf"{target}.\1.scale.conv.\2"),
        Rule(block + r"relu\.fc\.0\.(.+)", rf"{target}.\1.task.squeeze.\2"),
        Rule(block + r"relu\.fc\.2\.(.+)", rf"{target}.\1.task.excite.\2"),
    ]


def resnet_settings(shapes: Shapes) -> dict[str, Any]:
    """MSRA's ResNet, and how its pixels come."""
    prefix = "backbone.backbone." if has(shapes, r"backbone\.backbone\.") else "backbone."
    name = resnet_name(shapes, _BODY + r"res4\.(\d+)\.", f"{prefix}bottom_up.res2.0.conv2.weight")
    return {} if name is None else CAFFE | {"backbone.name": name, "backbone.stride_in_1x1": True}


def recognise(shapes: Shapes) -> bool:
    """Whether names are those of a detectron2 model with an FPN (cvpods shares them and must be asked first)."""
    return has(shapes, _BODY)


def recipe(source: Source) -> Recipe:
    """The experiment of a release.

    Raises:
        UserError: if none of ours has its head.
    """
    shapes = source.shapes
    dyhead = has(shapes, _TOWER)
    blocks = "head"  # where the chain of DyHead and towers keeps the first
    settings = resnet_settings(shapes)
    if dyhead and "head.cls_logits.weight" in shapes:
        experiment = "dyhead_atss_r50_official" if settings else "dyhead_atss_swint"
        classes = shapes["head.cls_logits.weight"][0]
    elif "head.cls_score.weight" in shapes and "head.centerness.weight" not in shapes:
        classes = shapes["head.cls_score.weight"][0] * 4 // shapes["head.bbox_pred.weight"][0]
        experiment = "dyhead_retinanet_r50"
        blocks = "head.attention"
        if not dyhead:
            experiment = "retinanet_r50"
            settings |= {
                "head.ignore_padding": False,
                "neck.relu_before_extra": True,
                "predictor.anchors.order": "ratio",
                "predictor.coder.clamp": "upper",
                "predictor.postprocess.clip": "after",
            }
    elif "roi_heads.box_predictor.cls_score.weight" in shapes:
        classes = shapes["roi_heads.box_predictor.cls_score.weight"][0] - 1
        experiment = "dyhead_faster_rcnn_r50" if dyhead else "faster_rcnn_r50"
        settings |= {"predictor.rpn.ignore_padding": False}
        if dyhead:
            settings |= {"head.ignore_padding": False}
    else:
        raise UserError(f"{source.path} is a model of detectron2 whose head dyndet does not have")
    if dyhead:
        settings[f"{blocks}.num_blocks"] = count(shapes, _TOWER + r"(\d+)")
    rules = [
        *_DROPPED,
        *RESNET,
        *_SWIN,
        *fpn_rules(shapes),
        *_dyhead(f"{blocks}.blocks"),
        *dense_rules("head.towers" if dyhead else "head"),
        *_TWO_STAGE,
    ]
    return Recipe(experiment, rules, classes, settings)
