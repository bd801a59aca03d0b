"""mmdetection 2.x and 3.x: how its releases are told apart and what their tensors are called.

| release | known by |
| --- | --- |
| ATSS | `bbox_head.atss_cls` and towers |
| DyHead + ATSS | `dyhead_blocks`; last convolutions 3x3: "simple", 1x1: reproduction, Swin-L by `backbone.stages` |
| FCOS | `bbox_head.conv_cls`; convolutions of the towers have a bias: the improved one, otherwise the plain one |
| RetinaNet, FreeAnchor | `bbox_head.retina_cls`; the same tensors: FreeAnchor if the file's meta data name it |
| Faster R-CNN | `rpn_head` and `roi_head` |
| Mask R-CNN | `roi_head.mask_head`; Swin-T and Swin-S by `backbone.stages` and the blocks of its third stage |

Depth and groups of a ResNet follow from its tensors. Mean, std, channel order, padding divisor and the place of a
bottleneck's stride are read from the configuration that releases carry as text in `meta`; without it they follow the
release's published configuration. Anchor offset and box coding follow the experiment.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dyndet.convert.engine import Rule, drop
from dyndet.convert.recipe import CAFFE, Recipe, Shapes, count, has, resnet_name
from dyndet.convert.source import Source
from dyndet.convert.tensor_transforms import background_first, linear_of_1x1, merged_by_position
from dyndet.errors import UserError

NAME = "mmdetection"

_DROPPED = (
    drop(r".*\.relative_position_index", "follows from the window size"),
    drop(r"data_preprocessor\.(mean|std)", "taken over by preprocess"),
    drop(r"(ema_model|ema_).*", "a moving average of training"),
)
_RESNET = (Rule(r"backbone\.(conv1|bn1|layer\d)\.(.+)", r"backbone.body.\1.\2"),)
_STAGES = r"backbone\.stages\."
_SWIN_BLOCK, _OUR_BLOCK = _STAGES + r"(\d)\.blocks\.(\d+)\.", r"backbone.body.layers_\1.blocks.\2."
_SWIN = (
    Rule(r"backbone\.patch_embed\.projection\.(.+)", r"backbone.body.patch_embed.proj.\1"),
    Rule(r"backbone\.patch_embed\.norm\.(.+)", r"backbone.body.patch_embed.norm.\1"),
    Rule(_SWIN_BLOCK + r"attn\.w_msa\.(.+)", _OUR_BLOCK + r"attn.\3"),
    Rule(_SWIN_BLOCK + r"ffn\.layers\.0\.0\.(.+)", _OUR_BLOCK + r"mlp.fc1.\3"),
    Rule(_SWIN_BLOCK + r"ffn\.layers\.1\.(.+)", _OUR_BLOCK + r"mlp.fc2.\3"),
    Rule(_SWIN_BLOCK + r"(norm[12]\..+)", _OUR_BLOCK + r"\3"),
    # A stage's end here is the next one's start in timm.
    *(
        Rule(rf"{_STAGES}{i}\.downsample\.(.+)", rf"backbone.body.layers_{i + 1}.downsample.\1", merged_by_position)
        for i in range(3)
    ),
)
_BLOCK = r"neck\.1\.dyhead_blocks\.(\d+)\."
_DYHEAD = (
    Rule(_BLOCK + r"spatial_conv_offset\.(.+)", r"head.blocks.\1.offset.\2"),
    Rule(_BLOCK + r"spatial_conv_(high|mid|low)\.conv\.(.+)", r"head.blocks.\1.\2.\3"),
    Rule(_BLOCK + r"spatial_conv_(high|mid|low)\.norm\.(.+)", r"head.blocks.\1.\2.norm.\3"),
    Rule(_BLOCK + r"scale_attn_module\.1\.(.+)", r"head.blocks.\1.scale.conv.\2"),
    Rule(_BLOCK + r"task_attn_module\.conv1\.conv\.weight", r"head.blocks.\1.task.squeeze.weight", linear_of_1x1),
    Rule(_BLOCK + r"task_attn_module\.conv2\.conv\.weight", r"head.blocks.\1.task.excite.weight", linear_of_1x1),
    Rule(_BLOCK + r"task_attn_module\.conv1\.conv\.bias", r"head.blocks.\1.task.squeeze.bias"),
    Rule(_BLOCK + r"task_attn_module\.conv2\.conv\.bias", r"head.blocks.\1.task.excite.bias"),
)
_DENSE = (
    Rule(r"bbox_head\.(?:atss|conv|fcos|retina)_cls\.(.+)", r"predictor.cls.\1"),
    Rule(r"bbox_head\.(?:atss|conv|fcos|retina)_reg\.(.+)", r"predictor.box.\1"),
    Rule(r"bbox_head\.(?:atss_|conv_|fcos_)?centerness\.(.+)", r"predictor.centerness.\1"),
    Rule(r"bbox_head\.scales\.(\d+)\.scale", r"predictor.scales[\1]"),
)
_RPN = (
    Rule(r"rpn_head\.rpn_conv\.(.+)", r"rpn.network.head.conv.0.0.\1"),
    Rule(r"rpn_head\.rpn_cls\.(.+)", r"rpn.network.head.cls_logits.\1"),
    Rule(r"rpn_head\.rpn_reg\.(.+)", r"rpn.network.head.bbox_pred.\1"),
)
_MASKS = (
    Rule(r"roi_head\.mask_head\.convs\.(\d+)\.conv\.(.+)", r"predictor.mask_head.layers.\1.0.\2"),
    Rule(r"roi_head\.mask_head\.upsample\.(.+)", r"predictor.mask_head.masks.conv5_mask.\1"),
    Rule(r"roi_head\.mask_head\.conv_logits\.(.+)", r"predictor.mask_head.masks.mask_fcn_logits.\1"),
)
_MASK_LOGITS = "roi_head.mask_head.conv_logits.weight"


def _neck(levels: int) -> list[Rule]:
    """An FPN of so many backbone maps; what follows in the list of outputs are the extra levels."""
    prefix = r"neck\.(?:0\.)?"
    return [
        Rule(prefix + r"lateral_convs\.(\d+)\.conv\.(.+)", r"neck.lateral.\1.\2"),
        *(Rule(prefix + rf"fpn_convs\.{i}\.conv\.(.+)", rf"neck.output.{i}.\1") for i in range(levels)),
        *(Rule(prefix + rf"fpn_convs\.{levels + i}\.conv\.(.+)", rf"neck.extra.{i}.\1") for i in range(2)),
    ]


def _swin_norms(shapes: Shapes) -> list[Rule]:
    """A norm carries the number of its stage, the first with an output is 0 or 1."""
    first = 0 if has(shapes, r"backbone\.norm0\.") else 1
    return [Rule(rf"backbone\.norm{first + i}\.(.+)", rf"backbone.output_norm.{i}.\1") for i in range(4 - first)]


def _boxes(shapes: Shapes) -> list[Rule]:
    """The boxes' stage; with masks, it is a part of the second stage."""
    source, target = r"roi_head\.bbox_head\.", "predictor.box.stage" if _MASK_LOGITS in shapes else "predictor.stage"
    return [
        Rule(source + r"shared_fcs\.0\.(.+)", target + r".box_head.layers.fc6.\1"),
        Rule(source + r"shared_fcs\.1\.(.+)", target + r".box_head.layers.fc7.\1"),
        Rule(source + r"fc_cls\.(.+)", target + r".box_head.cls.\1", background_first),
        Rule(source + r"fc_reg\.(.+)", target + r".box_head.box.\1"),
    ]


def _towers(convs: int, *, norms: bool) -> list[Rule]:
    """Convolution, perhaps norm, ReLU: 3 or 2 layers of ours for one of theirs."""
    step = 3 if norms else 2
    rules = []
    for branch in ("cls", "reg"):
        for i in range(convs):
            source, target = rf"bbox_head\.{branch}_convs\.{i}\.", f"head.{branch}."
            rules.append(Rule(source + r"conv\.(.+)", rf"{target}{step * i}.\1"))
            rules.append(Rule(source + r"gn\.(.+)", rf"{target}{step * i + 1}.\1"))
    return rules


def recognise(shapes: Shapes) -> bool:
    """Whether names are those of an mmdetection model."""
    return has(shapes, r"neck\.(0\.)?(lateral|fpn)_convs\.") and has(shapes, r"(bbox|rpn|roi)_head\.")


def recipe(source: Source) -> Recipe:
    """The experiment of a release.

    Raises:
        UserError: if none of ours has its head.
    """
    shapes = source.shapes
    text = _config_text(source.meta)
    dyhead = has(shapes, _BLOCK)
    convs = count(shapes, r"bbox_head\.cls_convs\.(\d+)")
    settings: dict[str, Any] = {}
    note = ""
    if "bbox_head.atss_cls.weight" in shapes:
        cls = shapes["bbox_head.atss_cls.weight"]
        experiment = "atss_r50"
        if dyhead and cls[-1] == 3:
            experiment = "dyhead_atss_r50_simple"
        elif dyhead:
            experiment = "dyhead_atss_swinl" if has(shapes, _STAGES) else "dyhead_atss_r50_reproduction"
        classes = cls[0]
    elif "bbox_head.retina_cls.weight" in shapes:
        experiment = "freeanchor_r50" if "FreeAnchorRetinaHead" in text else "retinanet_r50"
        note = "" if text else "the file does not name its head: if it is FreeAnchor, add experiment=freeanchor_r50"
        classes = shapes["bbox_head.retina_cls.weight"][0] * 4 // shapes["bbox_head.retina_reg.weight"][0]
    elif has(shapes, r"bbox_head\.(conv|fcos)_cls\."):
        improved = "bbox_head.cls_convs.0.conv.bias" in shapes
        experiment = "fcos_r50_mmdet" if improved else "fcos_r50_mmdet_plain"
        # The plain releases start from the first Caffe ResNet, the improved ones from detectron2's.
        settings |= CAFFE if improved else {"preprocess.mean": [102.9801 / 255, 115.9465 / 255, 122.7717 / 255]}
        classes = next(shape[0] for name, shape in shapes.items() if re.match(r"bbox_head\.(conv|fcos)_cls\.", name))
    elif "roi_head.bbox_head.fc_cls.weight" in shapes:
        experiment = "mask_rcnn_r50" if _MASK_LOGITS in shapes else "faster_rcnn_r50"
        if _MASK_LOGITS in shapes and has(shapes, _STAGES):
            experiment = "mask_rcnn_swint"
            if count(shapes, _STAGES + r"2\.blocks\.(\d+)\.") == 18:
                settings["backbone.name"] = "swin_small_patch4_window7_224"
        classes = shapes["roi_head.bbox_head.fc_cls.weight"][0] - 1
        settings |= {"predictor.rpn.ignore_padding": False}
    else:
        raise UserError(f"{source.path} is a model of mmdetection whose head dyndet does not have")
    if experiment == "dyhead_atss_r50_reproduction":
        settings["backbone.stride_in_1x1"] = True  # style='caffe' in its configuration
    if dyhead:
        settings["head.num_blocks"] = count(shapes, _BLOCK)
    elif convs:
        settings |= {"head.num_convs": convs, "head.ignore_padding": False}
    name = resnet_name(shapes, r"backbone\.layer3\.(\d+)\.", "backbone.layer1.0.conv2.weight")
    if name is not None:
        settings["backbone.name"] = name
    rules = [
        *_DROPPED,
        *(_RESNET if name else (*_SWIN, *_swin_norms(shapes))),
        *_neck(count(shapes, r"neck\.(?:0\.)?lateral_convs\.(\d+)")),
        *_DYHEAD,
        *_towers(convs, norms=has(shapes, r"bbox_head\.cls_convs\.\d+\.gn\.")),
        *_DENSE,
        *_RPN,
        *_boxes(shapes),
        *_MASKS,
    ]
    settings |= _settings(text)
    return Recipe(experiment, rules, classes, settings, _class_names(source.meta), note)


def _config_text(meta: Mapping[str, Any]) -> str:
    """The configuration as Python text: "config" in 2.x, "cfg" in 3.x."""
    return next((meta[key] for key in ("cfg", "config") if isinstance(meta.get(key), str)), "")


def _settings(text: str) -> dict[str, Any]:
    """What a configuration says about pixels and strides."""
    settings: dict[str, Any] = {}
    for key in ("mean", "std"):
        if match := re.search(rf"\b{key}=\[([^\]]+)\]", text):
            settings[f"preprocess.{key}"] = [float(item) / 255 for item in match.group(1).split(",") if item.strip()]
    if match := re.search(r"\b(?:bgr_)?to_rgb=(True|False)", text):
        settings["preprocess.bgr"] = match.group(1) == "False"
    if match := re.search(r"\b(?:pad_)?size_divisor=(\d+)", text):
        settings["preprocess.pad_multiple"] = int(match.group(1))
    if match := re.search(r"\bstyle=['\"](caffe|pytorch)['\"]", text):
        settings["backbone.stride_in_1x1"] = match.group(1) == "caffe"
    return settings


def _class_names(meta: Mapping[str, Any]) -> list[str] | None:
    """CLASSES in 2.x, dataset_meta in 3.x."""
    data = meta.get("dataset_meta")
    data = data if isinstance(data, Mapping) else {}
    names = meta.get("CLASSES") or data.get("classes") or data.get("CLASSES")
    return [str(name) for name in names] if isinstance(names, list | tuple) else None
