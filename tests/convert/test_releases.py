"""Every released layout converts with nothing missing or left over, and every tensor arrives where it belongs."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from released_layouts import RELEASES, Release, marked
from torch import Tensor, nn

import dyndet
from dyndet import build_detector
from dyndet.cli.compose import build
from dyndet.convert import Converted, read_release
from dyndet.convert.coco_categories import coco_categories
from dyndet.errors import UserError


def write(folder: Path, release: Release, weights: dict[str, Tensor] | None = None) -> Path:
    file = folder / "release.pth"
    weights = marked(release.shapes) if weights is None else weights
    torch.save({release.container: weights, "meta": release.meta, "iteration": 89999}, file)
    return file


def load_strictly(converted: Converted) -> nn.Module:
    with torch.device("meta"):
        detector = build(converted.config.detector)
    detector.load_state_dict(converted.state_dict, strict=True, assign=True)
    return detector


WHERE = {
    "mmdet atss_r50": {
        "backbone.layer3.5.conv2.weight": "backbone.body.layer3.5.conv2.weight",
        "backbone.layer2.0.downsample.1.running_var": "backbone.body.layer2.0.downsample.1.running_var",
        "neck.lateral_convs.2.conv.bias": "neck.lateral.2.bias",
        "neck.fpn_convs.2.conv.weight": "neck.output.2.weight",
        "neck.fpn_convs.4.conv.weight": "neck.extra.1.weight",
        "bbox_head.cls_convs.3.conv.weight": "head.cls.9.weight",
        "bbox_head.reg_convs.1.gn.bias": "head.reg.4.bias",
        "bbox_head.atss_centerness.weight": "predictor.centerness.weight",
        "bbox_head.scales.3.scale": "predictor.scales[3]",
    },
    "mmdet retinanet_r50": {"bbox_head.reg_convs.3.conv.bias": "head.reg.6.bias"},
    "mmdet dyhead simple": {
        "neck.0.fpn_convs.3.conv.weight": "neck.extra.0.weight",
        "neck.1.dyhead_blocks.4.spatial_conv_low.conv.weight": "head.blocks.4.low.weight",
        "neck.1.dyhead_blocks.5.spatial_conv_high.norm.weight": "head.blocks.5.high.norm.weight",
        "neck.1.dyhead_blocks.0.task_attn_module.conv2.conv.weight": "head.blocks.0.task.excite.weight",
    },
    "mmdet dyhead swin-l": {
        "backbone.stages.2.blocks.17.attn.w_msa.qkv.weight": "backbone.body.layers_2.blocks.17.attn.qkv.weight",
        "backbone.stages.1.blocks.0.ffn.layers.1.bias": "backbone.body.layers_1.blocks.0.mlp.fc2.bias",
        "backbone.stages.2.downsample.norm.weight": "backbone.body.layers_3.downsample.norm.weight",
        "backbone.norm3.bias": "backbone.output_norm.2.bias",
    },
    "mmdet faster_rcnn_r50": {
        "neck.fpn_convs.3.conv.weight": "neck.output.3.weight",
        "rpn_head.rpn_reg.weight": "rpn.network.head.bbox_pred.weight",
        "roi_head.bbox_head.shared_fcs.1.weight": "predictor.stage.box_head.layers.fc7.weight",
    },
    "mmdet mask_rcnn_r50": {
        "roi_head.bbox_head.fc_cls.bias": "predictor.box.stage.box_head.cls.bias",
        "roi_head.mask_head.convs.2.conv.weight": "predictor.mask_head.layers.2.0.weight",
        "roi_head.mask_head.upsample.weight": "predictor.mask_head.masks.conv5_mask.weight",
        "roi_head.mask_head.conv_logits.bias": "predictor.mask_head.masks.mask_fcn_logits.bias",
    },
    "mmdet mask_rcnn swin-t": {
        "backbone.norm0.weight": "backbone.output_norm.0.weight",
        "backbone.norm3.bias": "backbone.output_norm.3.bias",
        "neck.lateral_convs.0.conv.weight": "neck.lateral.0.weight",
    },
    "mmdet mask_rcnn swin-s": {
        "backbone.stages.2.blocks.17.ffn.layers.1.bias": "backbone.body.layers_2.blocks.17.mlp.fc2.bias",
    },
    "authors dyhead atss": {
        "backbone.backbone.bottom_up.stem.conv1.norm.running_mean": "backbone.body.bn1.running_mean",
        "backbone.backbone.bottom_up.res4.0.shortcut.norm.weight": "backbone.body.layer3.0.downsample.1.weight",
        "backbone.backbone.bottom_up.res5.2.conv3.weight": "backbone.body.layer4.2.conv3.weight",
        "backbone.backbone.fpn_lateral4.weight": "neck.lateral.1.weight",
        "backbone.backbone.fpn_output3.weight": "neck.output.0.weight",
        "backbone.backbone.top_block.p7.weight": "neck.extra.1.weight",
        # The first convolution is for the coarser level, the second for the level itself, the third has the stride.
        "backbone.dyhead_tower.2.DyConv.0.conv.weight": "head.blocks.2.high.weight",
        "backbone.dyhead_tower.2.DyConv.1.conv.bias": "head.blocks.2.mid.bias",
        "backbone.dyhead_tower.2.DyConv.2.bn.weight": "head.blocks.2.low.norm.weight",
        "backbone.dyhead_tower.5.relu.fc.0.weight": "head.blocks.5.task.squeeze.weight",
        "head.cls_logits.weight": "predictor.cls.weight",
    },
    "authors dyhead retinanet": {
        "backbone.dyhead_tower.0.AttnConv.1.weight": "head.attention.blocks.0.scale.conv.weight",
        "head.bbox_subnet.6.weight": "head.towers.reg.6.weight",
    },
    "authors dyhead swin-t": {
        "backbone.backbone.bottom_up.layers.0.downsample.reduction.weight": (
            "backbone.body.layers_1.downsample.reduction.weight"
        ),
        "backbone.backbone.bottom_up.norm1.weight": "backbone.output_norm.0.weight",
    },
    "authors dyhead faster_rcnn": {
        "backbone.backbone.fpn_lateral2.weight": "neck.lateral.0.weight",
        "proposal_generator.rpn_head.anchor_deltas.weight": "rpn.network.head.bbox_pred.weight",
        "roi_heads.box_predictor.bbox_pred.bias": "predictor.stage.box_head.box.bias",
    },
    "fcos": {"head.bbox_subnet.9.weight": "head.reg.9.weight", "head.cls_subnet.4.bias": "head.cls.4.bias"},
    "fcos dynamic D8": {
        # Neighbour 0 is the finer level, whose features travel down.
        "head.cls_subnet.7.dynamic_convs.0.convs.0.weight": "head.cls.7.down.conv.weight",
        "head.bbox_subnet.0.dynamic_convs.1.convs.1.weight": "head.reg.0.up.norm.weight",
        "head.bbox_subnet.3.dynamic_convs.1.gate.gate_conv.bias": "head.reg.3.gates.up.conv.bias",
        "head.cls_subnet.1.depth_module.gate.gate_conv.weight": "head.cls.1.gates.depth.conv.weight",
        "head.cls_subnet.1.depth_module.bottleneck.conv2.norm.weight": "head.cls.1.depth.norm2.weight",
        "head.cls_subnet.5.scale_weight": "head.cls.5.scale_weight",
    },
    "fcos fixed D4": {
        "head.cls_subnet.3.convs.0.0.bias": "head.cls.3.down.conv.bias",
        "head.bbox_subnet.2.depth_module.bottleneck.conv1.weight": "head.reg.2.depth.conv1.weight",
    },
}


@pytest.mark.parametrize("name", RELEASES)
def test_release_converts(name: str, tmp_path: Path) -> None:
    release = RELEASES[name]
    converted = read_release(write(tmp_path, release))
    assert converted.experiment == release.experiment
    for key, wanted in release.settings.items():
        value = OmegaConf.select(converted.config, key)
        if key in ("preprocess.mean", "preprocess.std"):
            value = [255 * number for number in value]
        assert value == pytest.approx(wanted, abs=1e-6) if isinstance(wanted, list) else value == wanted, key
    report = converted.report
    assert {*report.used, *report.unused} == set(release.shapes)
    allowed = ("num_batches_tracked", "relative_position_index", "cell_anchors")
    assert all(any(part in name for part in allowed) for name in report.unused)
    assert WHERE.get(name, {}).items() <= report.used.items()
    load_strictly(converted)
    assert converted.categories == coco_categories()
    # Tensors hold their own number, so each of ours is one of theirs, as the report says, and none comes twice.
    numbers = {key: float(number) for number, key in enumerate(release.shapes, 1)}
    arrived: dict[str, list[float]] = defaultdict(list)
    for theirs, ours in report.used.items():
        arrived[ours.partition("[")[0]].append(numbers[theirs])
    for ours, value in converted.state_dict.items():
        if ours in report.filled:
            assert ours.endswith(("num_batches_tracked", "normaliser.average"))
        elif len(arrived[ours]) > 1:
            assert value.tolist() == arrived[ours]
        else:
            assert [value.min(), value.max()] == arrived[ours] * 2, ours


def test_scales_are_in_level_order(tmp_path: Path) -> None:
    release = RELEASES["mmdet fcos plain"]
    weights = marked(release.shapes)
    weights |= {f"bbox_head.scales.{level}.scale": torch.tensor(1.0 + level) for level in (4, 2, 0, 1, 3)}
    converted = read_release(write(tmp_path, release, weights))
    assert converted.state_dict["predictor.scales"].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["mmdet atss_r50", "fcos dynamic D4"])
def test_one_call_from_a_release_to_a_detector(name: str, tmp_path: Path) -> None:
    """The second needs overrides, without which a strict load succeeds and computes something else."""
    file = write(tmp_path, RELEASES[name])
    detector, converted = dyndet.load_release(file), read_release(file)
    assert not detector.training
    weights = detector.state_dict()
    assert weights.keys() == converted.state_dict.keys()
    assert all(torch.equal(weights[key], value) for key, value in converted.state_dict.items())
    expected = build(converted.config.detector)
    assert torch.equal(detector.preprocess.mean, expected.preprocess.mean)
    assert detector.preprocess.bgr == expected.preprocess.bgr
    assert vars(detector.predictor.postprocess) == vars(expected.predictor.postprocess)  # type: ignore[union-attr]
    if name == "fcos dynamic D4":
        assert detector.predictor.postprocess.candidates == "locations"  # type: ignore[union-attr]


def test_weights_without_their_settings_are_no_longer_handed_out() -> None:
    with pytest.raises(UserError, match=r"use dyndet\.load_release\(path\)"):
        from dyndet.convert import convert_checkpoint  # type: ignore[attr-defined]  # noqa: F401


def test_overrides_make_the_same_detector(tmp_path: Path) -> None:
    converted = read_release(write(tmp_path, RELEASES["fcos dynamic D4"]))
    with torch.device("meta"):
        detector = build_detector(converted.experiment, converted.overrides)
    detector.load_state_dict(converted.state_dict, strict=True, assign=True)
    assert detector.preprocess.bgr


MM3 = """
model = dict(
    backbone=dict(depth=50, style='caffe', type='ResNet'),
    bbox_head=dict(bbox_coder=dict(target_means=[0.0, 0.0, 0.0, 0.0], target_stds=[0.1, 0.1, 0.2, 0.2])),
    data_preprocessor=dict(
        bgr_to_rgb=False,
        mean=[
            103.53,
            116.28,
            123.675,
        ],
        pad_size_divisor=64,
        std=[
            1.0,
            1.0,
            1.0,
        ],
        type='DetDataPreprocessor'))
"""
MM2 = """
model = dict(backbone=dict(type='ResNet', depth=50, style='caffe'))
img_norm_cfg = dict(
    mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)
train_pipeline = [dict(type='Normalize', **img_norm_cfg), dict(type='Pad', size_divisor=64)]
"""


@pytest.mark.parametrize("meta", [{"cfg": MM3}, {"config": MM2}], ids=["3.x", "2.x"])
def test_pixels_follow_the_configuration_in_the_file(meta: dict[str, str], tmp_path: Path) -> None:
    """As RetinaNet R50 caffe, which has the tensors of RetinaNet R50."""
    release = RELEASES["mmdet retinanet_r50"]
    file = tmp_path / "release.pth"
    torch.save({"state_dict": marked(release.shapes), "meta": meta}, file)
    config = read_release(file).config
    assert [round(255 * value, 3) for value in config.preprocess.mean] == [103.53, 116.28, 123.675]
    assert [round(255 * value, 6) for value in config.preprocess.std] == [1, 1, 1]
    assert config.preprocess.bgr and config.preprocess.pad_multiple == 64 and config.backbone.stride_in_1x1


def test_other_classes(tmp_path: Path) -> None:
    release = RELEASES["mmdet retinanet_r50"]
    weights = marked(release.shapes)
    weights |= {"bbox_head.retina_cls.weight": torch.zeros(27, 256, 3, 3), "bbox_head.retina_cls.bias": torch.zeros(27)}
    file = tmp_path / "release.pth"
    for meta, names in (
        ({"CLASSES": ("cat", "dog", "cow")}, ["cat", "dog", "cow"]),
        ({"dataset_meta": {"classes": ["cat", "dog", "cow"]}}, ["cat", "dog", "cow"]),
        ({}, ["class 1", "class 2", "class 3"]),
    ):
        torch.save({"state_dict": weights, "meta": meta}, file)
        converted = read_release(file)
        assert converted.overrides == ["data.num_classes=3", "head.ignore_padding=false"]
        assert [(category.id, category.name) for category in converted.categories] == list(enumerate(names, 1))


def test_other_depths_need_no_experiment_of_their_own(tmp_path: Path) -> None:
    from released_layouts import cvpods_nodes, cvpods_predictors, detectron_fpn, detectron_resnet

    parts = (
        detectron_resnet("backbone.bottom_up", (3, 4, 23, 3)),
        detectron_fpn("backbone", (512, 1024, 2048), (2048, 256)),
        cvpods_nodes(3, dynamic=True),
        cvpods_predictors(),
    )
    file = tmp_path / "release.pth"
    torch.save({"model": marked(dict(item for part in parts for item in part))}, file)
    converted = read_release(file)
    assert converted.experiment == "fcos_d8_dyn"
    assert {"head.depth=3", "backbone.name=resnet101"} <= set(converted.overrides)
    load_strictly(converted)


def test_an_experiment_can_be_named(tmp_path: Path) -> None:
    converted = read_release(write(tmp_path, RELEASES["fcos dynamic D8"]), "fcos_d8_dyn_high")
    assert converted.config.name == "fcos_d8_dyn_high" and converted.config.budget.weight == 0
    file = write(tmp_path, RELEASES["mmdet retinanet_r50"])
    assert "freeanchor_r50" in read_release(file).note
    converted = read_release(file, "freeanchor_r50")
    assert OmegaConf.select(converted.config, "predictor.bag_size") == 50 and not converted.note


def test_coco_has_gaps() -> None:
    categories = coco_categories()
    assert len(categories) == 80 == len({category.name for category in categories})
    gaps = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert [category.id for category in categories] == [number for number in range(1, 91) if number not in gaps]
    named = {category.id: category.name for category in categories}
    assert (named[1], named[44], named[62], named[90]) == ("person", "bottle", "chair", "toothbrush")
