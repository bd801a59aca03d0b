"""What released checkpoints hold, listed from the architectures: names as the sources have them, and shapes.

Written from the layers (stages, blocks, heads), not from the converter's tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
Items = Iterator[tuple[str, tuple[int, ...]]]

CLASSES = 80
STATISTICS = ("weight", "bias", "running_mean", "running_var")


def conv(name: str, out: int, into: int, kernel: int, *, bias: bool = True) -> Items:
    yield f"{name}.weight", (out, into, kernel, kernel)
    if bias:
        yield f"{name}.bias", (out,)


def linear(name: str, out: int, into: int, *, bias: bool = True) -> Items:
    yield f"{name}.weight", (out, into)
    if bias:
        yield f"{name}.bias", (out,)


def affine(name: str, channels: int) -> Items:
    yield f"{name}.weight", (channels,)
    yield f"{name}.bias", (channels,)


def norm(name: str, channels: int, *, counter: bool) -> Items:
    for part in STATISTICS:
        yield f"{name}.{part}", (channels,)
    if counter:
        yield f"{name}.num_batches_tracked", ()


# ---- backbones


def resnet(depths: tuple[int, ...], unit: Callable[..., Items], block_name: Callable[[int, int], str]) -> Items:
    yield from unit("stem", "", 64, 3, 7)
    into = 64
    for stage, depth in enumerate(depths):
        width, out = 64 * 2**stage, 256 * 2**stage
        for block in range(depth):
            name = block_name(stage, block)
            yield from unit("1", name, width, into, 1)
            yield from unit("2", name, width, width, 3)
            yield from unit("3", name, out, width, 1)
            if block == 0:
                yield from unit("shortcut", name, out, into, 1)
            into = out


def openmmlab_unit(which: str, block: str, out: int, into: int, kernel: int) -> Items:
    """torchvision's names; batch norms count their batches."""
    names = {"stem": ("conv1", "bn1"), "shortcut": (f"{block}.downsample.0", f"{block}.downsample.1")}
    layer, statistics = names.get(which, (f"{block}.conv{which}", f"{block}.bn{which}"))
    yield from conv(f"backbone.{layer}", out, into, kernel, bias=False)
    yield from norm(f"backbone.{statistics}", out, counter=True)


def detectron_unit(body: str) -> Callable[..., Items]:
    """The norm is part of the convolution; frozen norms do not count."""

    def unit(which: str, block: str, out: int, into: int, kernel: int) -> Items:
        names = {"stem": "stem.conv1", "shortcut": f"{block}.shortcut"}
        layer = names.get(which, f"{block}.conv{which}")
        yield from conv(f"{body}.{layer}", out, into, kernel, bias=False)
        yield from norm(f"{body}.{layer}.norm", out, counter=False)

    return unit


def openmmlab_resnet(depths: tuple[int, ...] = (3, 4, 6, 3)) -> Items:
    return resnet(depths, openmmlab_unit, lambda stage, block: f"layer{stage + 1}.{block}")


def detectron_resnet(body: str, depths: tuple[int, ...] = (3, 4, 6, 3)) -> Items:
    return resnet(depths, detectron_unit(body), lambda stage, block: f"res{stage + 2}.{block}")


def swin(
    body: str,
    *,
    embed: int,
    depths: tuple[int, ...],
    heads: tuple[int, ...],
    window: int,
    openmmlab: bool,
    first_norm: int = 1,
) -> Items:
    stage_name = "stages" if openmmlab else "layers"
    attention = "attn.w_msa" if openmmlab else "attn"
    fc1, fc2 = ("ffn.layers.0.0", "ffn.layers.1") if openmmlab else ("mlp.fc1", "mlp.fc2")
    yield from conv(f"{body}.patch_embed.{'projection' if openmmlab else 'proj'}", embed, 3, 4)
    yield from affine(f"{body}.patch_embed.norm", embed)
    for stage, (depth, head) in enumerate(zip(depths, heads, strict=True)):
        c = embed * 2**stage
        for block in range(depth):
            name = f"{body}.{stage_name}.{stage}.blocks.{block}"
            yield from affine(f"{name}.norm1", c)
            yield f"{name}.{attention}.relative_position_bias_table", ((2 * window - 1) ** 2, head)
            yield f"{name}.{attention}.relative_position_index", (window**2, window**2)
            yield from linear(f"{name}.{attention}.qkv", 3 * c, c)
            yield from linear(f"{name}.{attention}.proj", c, c)
            yield from affine(f"{name}.norm2", c)
            yield from linear(f"{name}.{fc1}", 4 * c, c)
            yield from linear(f"{name}.{fc2}", c, 4 * c)
        if stage < 3:
            yield from linear(f"{body}.{stage_name}.{stage}.downsample.reduction", 2 * c, 4 * c, bias=False)
            yield from affine(f"{body}.{stage_name}.{stage}.downsample.norm", 4 * c)
    for stage in range(first_norm, 4):
        yield from affine(f"{body}.norm{stage}", embed * 2**stage)


def swin_large() -> Items:
    return swin("backbone", embed=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48), window=12, openmmlab=True)


def swin_tiny() -> Items:
    body = "backbone.backbone.bottom_up"
    return swin(body, embed=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), window=7, openmmlab=False)


def openmmlab_swin(depth: int) -> Items:
    """T or S, with an output of every stage."""
    depths, heads = (2, 2, depth, 2), (3, 6, 12, 24)
    return swin("backbone", embed=96, depths=depths, heads=heads, window=7, openmmlab=True, first_norm=0)


# ---- necks


def openmmlab_fpn(name: str, into: tuple[int, ...], extra: tuple[int, ...]) -> Items:
    for level, channels in enumerate(into):
        yield from conv(f"{name}.lateral_convs.{level}.conv", 256, channels, 1)
    for level, channels in enumerate((*[256] * len(into), *extra)):
        yield from conv(f"{name}.fpn_convs.{level}.conv", 256, channels, 3)


def detectron_fpn(name: str, into: tuple[int, ...], extra: tuple[int, ...], first: int = 3) -> Items:
    for level, channels in enumerate(into, first):
        yield from conv(f"{name}.fpn_lateral{level}", 256, channels, 1)
        yield from conv(f"{name}.fpn_output{level}", 256, 256, 3)
    for level, channels in enumerate(extra, 6):
        yield from conv(f"{name}.top_block.p{level}", 256, channels, 3)


def openmmlab_dyhead(blocks: int = 6) -> Items:
    for index in range(blocks):
        name = f"neck.1.dyhead_blocks.{index}"
        for source in ("high", "mid", "low"):
            yield from conv(f"{name}.spatial_conv_{source}.conv", 256, 256, 3, bias=False)
            yield from affine(f"{name}.spatial_conv_{source}.norm", 256)
        yield from conv(f"{name}.spatial_conv_offset", 27, 256, 3)
        yield from conv(f"{name}.scale_attn_module.1", 1, 256, 1)
        yield from conv(f"{name}.task_attn_module.conv1.conv", 64, 256, 1)
        yield from conv(f"{name}.task_attn_module.conv2.conv", 1024, 64, 1)


def authors_dyhead(blocks: int = 6) -> Items:
    for index in range(blocks):
        name = f"backbone.dyhead_tower.{index}"
        for number in range(3):
            yield from conv(f"{name}.DyConv.{number}.conv", 256, 256, 3)
            yield from affine(f"{name}.DyConv.{number}.bn", 256)
        yield from conv(f"{name}.AttnConv.1", 1, 256, 1)
        yield from linear(f"{name}.relu.fc.0", 64, 256)
        yield from linear(f"{name}.relu.fc.2", 1024, 64)
        yield from conv(f"{name}.offset", 27, 256, 3)


# ---- heads


def openmmlab_towers(*, gn: bool, bias: bool) -> Items:
    for branch in ("cls_convs", "reg_convs"):
        for index in range(4):
            yield from conv(f"bbox_head.{branch}.{index}.conv", 256, 256, 3, bias=bias)
            if gn:
                yield from affine(f"bbox_head.{branch}.{index}.gn", 256)


def openmmlab_points(kind: str, kernel: int = 3, classes: int = CLASSES) -> Items:
    yield from conv(f"bbox_head.{kind}_cls", classes, 256, kernel)
    yield from conv(f"bbox_head.{kind}_reg", 4, 256, kernel)
    yield from conv(f"bbox_head.{kind}_centerness", 1, 256, kernel)
    yield from ((f"bbox_head.scales.{level}.scale", ()) for level in range(5))


def openmmlab_retina() -> Items:
    yield from conv("bbox_head.retina_cls", 9 * CLASSES, 256, 3)
    yield from conv("bbox_head.retina_reg", 36, 256, 3)


def openmmlab_two_stage(classes: int = CLASSES) -> Items:
    yield from conv("rpn_head.rpn_conv", 256, 256, 3)
    yield from conv("rpn_head.rpn_cls", 3, 256, 1)
    yield from conv("rpn_head.rpn_reg", 12, 256, 1)
    yield from linear("roi_head.bbox_head.fc_cls", classes + 1, 1024)
    yield from linear("roi_head.bbox_head.fc_reg", 4 * classes, 1024)
    yield from linear("roi_head.bbox_head.shared_fcs.0", 1024, 256 * 7 * 7)
    yield from linear("roi_head.bbox_head.shared_fcs.1", 1024, 1024)


def openmmlab_masks(classes: int = CLASSES) -> Items:
    for index in range(4):
        yield from conv(f"roi_head.mask_head.convs.{index}.conv", 256, 256, 3)
    yield from conv("roi_head.mask_head.upsample", 256, 256, 2)
    yield from conv("roi_head.mask_head.conv_logits", classes, 256, 1)


def detectron_two_stage(classes: int = CLASSES) -> Items:
    yield from conv("proposal_generator.rpn_head.conv", 256, 256, 3)
    yield from conv("proposal_generator.rpn_head.objectness_logits", 3, 256, 1)
    yield from conv("proposal_generator.rpn_head.anchor_deltas", 12, 256, 1)
    yield from ((f"proposal_generator.anchor_generator.cell_anchors.{level}", (3, 4)) for level in range(5))
    yield from linear("roi_heads.box_head.fc1", 1024, 256 * 7 * 7)
    yield from linear("roi_heads.box_head.fc2", 1024, 1024)
    yield from linear("roi_heads.box_predictor.cls_score", classes + 1, 1024)
    yield from linear("roi_heads.box_predictor.bbox_pred", 4 * classes, 1024)


def authors_atss() -> Items:
    yield from conv("head.cls_logits", CLASSES, 256, 1)
    yield from conv("head.bbox_pred", 4, 256, 1)
    yield from conv("head.centerness", 1, 256, 1)
    yield from ((f"head.scales.{level}.scale", (1,)) for level in range(5))


def detectron_retina() -> Items:
    for branch in ("cls_subnet", "bbox_subnet"):
        for index in range(4):
            yield from conv(f"head.{branch}.{2 * index}", 256, 256, 3)
    yield from conv("head.cls_score", 9 * CLASSES, 256, 3)
    yield from conv("head.bbox_pred", 36, 256, 3)
    yield from ((f"anchor_generator.cell_anchors.{level}", (9, 4)) for level in range(5))


def cvpods_predictors(classes: int = CLASSES) -> Items:
    yield from conv("head.cls_score", classes, 256, 3)
    yield from conv("head.bbox_pred", 4, 256, 3)
    yield from conv("head.centerness", 1, 256, 3)
    yield from ((f"head.scales.{level}.scale", (1,)) for level in range(5))


def cvpods_plain() -> Items:
    for branch in ("cls_subnet", "bbox_subnet"):
        for index in range(4):
            yield from conv(f"head.{branch}.{3 * index}", 256, 256, 3)
            yield from affine(f"head.{branch}.{3 * index + 1}", 256)


def cvpods_nodes(depth: int, *, dynamic: bool) -> Items:
    for branch in ("cls_subnet", "bbox_subnet"):
        for index in range(depth):
            node = f"head.{branch}.{index}"
            yield f"{node}.output_weight", (1,)
            if dynamic:
                yield f"{node}.scale_weight", (1,)
                yield from conv(f"{node}.depth_module.gate.gate_conv", 1, 256, 3)
            for number in (1, 2):
                name = f"{node}.depth_module.bottleneck.conv{number}"
                yield from conv(name, 256, 256, 3, bias=False)
                yield from affine(f"{name}.norm", 256)
            for neighbour in range(2):
                path = f"{node}.dynamic_convs.{neighbour}.convs" if dynamic else f"{node}.convs.{neighbour}"
                yield from conv(f"{path}.0", 256, 1, 3)
                yield from affine(f"{path}.1", 256)
                if dynamic:
                    yield from conv(f"{node}.dynamic_convs.{neighbour}.gate.gate_conv", 1, 256, 3)


# ---- releases


@dataclass(frozen=True)
class Release:
    """A published file: what it holds, the experiment it must become, and keys that its configuration must have."""

    items: tuple[Callable[[], Items], ...]
    experiment: str
    settings: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def shapes(self) -> Shapes:
        return dict(item for part in self.items for item in part())

    @property
    def container(self) -> str:
        """The key of the file under which its tensors are."""
        return "state_dict" if any(name.startswith("neck.") for name in self.shapes) else "model"


C3, C2, SWIN_L, SWIN_T = (512, 1024, 2048), (256, 512, 1024, 2048), (384, 768, 1536), (192, 384, 768)
MSRA = {
    "preprocess.bgr": True,
    "preprocess.mean": [103.53, 116.28, 123.675],  # in 0..255
    "preprocess.std": [1.0, 1.0, 1.0],
    "backbone.stride_in_1x1": True,
}
TORCHVISION = {
    "preprocess.bgr": False,
    "preprocess.mean": [123.675, 116.28, 103.53],
    "preprocess.std": [58.395, 57.12, 57.375],
    "preprocess.pad_multiple": 32,
}
TV_RESNET = {**TORCHVISION, "backbone.stride_in_1x1": False}
CVPODS = {
    **MSRA,
    "preprocess.pad_multiple": 32,
    "neck.extra_source": "C5",
    "neck.relu_before_extra": True,
    "predictor.ignore_padding": False,
    "predictor.point_offset": 0.0,
    "predictor.score": "sqrt",
    "predictor.postprocess.clip": "after",
    "predictor.postprocess.candidates": "locations",
}


def _mm(into: tuple[int, ...], extra: tuple[int, ...], name: str = "neck") -> Callable[[], Items]:
    return lambda: openmmlab_fpn(name, into, extra)


def _d2(prefix: str, into: tuple[int, ...], extra: tuple[int, ...], first: int = 3) -> Callable[[], Items]:
    return lambda: detectron_fpn(prefix, into, extra, first)


def _body(prefix: str) -> Callable[[], Items]:
    return lambda: detectron_resnet(f"{prefix}.bottom_up")


def _towers(*, gn: bool, bias: bool) -> Callable[[], Items]:
    return lambda: openmmlab_towers(gn=gn, bias=bias)


WRAPPED, BARE = "backbone.backbone", "backbone"
RELEASES: dict[str, Release] = {
    "mmdet atss_r50": Release(
        (openmmlab_resnet, _mm(C3, (256, 256)), _towers(gn=True, bias=False), lambda: openmmlab_points("atss")),
        "atss_r50",
        {**TV_RESNET, "predictor.center_offset": 0.0, "neck.extra_source": "P5", "neck.relu_before_extra": False},
    ),
    "mmdet atss_r101": Release(
        (
            lambda: openmmlab_resnet((3, 4, 23, 3)),
            _mm(C3, (256, 256)),
            _towers(gn=True, bias=False),
            lambda: openmmlab_points("atss"),
        ),
        "atss_r50",
        {**TV_RESNET, "backbone.name": "resnet101"},
    ),
    "mmdet fcos plain": Release(
        (openmmlab_resnet, _mm(C3, (256, 256)), _towers(gn=True, bias=False), lambda: openmmlab_points("conv")),
        "fcos_r50_mmdet_plain",
        {**MSRA, "preprocess.mean": [102.9801, 115.9465, 122.7717], "neck.relu_before_extra": True},
    ),
    "mmdet fcos improved": Release(
        (openmmlab_resnet, _mm(C3, (256, 256)), _towers(gn=True, bias=True), lambda: openmmlab_points("conv")),
        "fcos_r50_mmdet",
        {**MSRA, "predictor.centerness_on": "reg", "predictor.point_offset": 0.5},
    ),
    "mmdet retinanet_r50": Release(
        (openmmlab_resnet, _mm(C3, (2048, 256)), _towers(gn=False, bias=True), openmmlab_retina),
        "retinanet_r50",
        {**TV_RESNET, "neck.extra_source": "C5", "predictor.anchors.order": "scale"},
    ),
    "mmdet freeanchor_r50": Release(
        (openmmlab_resnet, _mm(C3, (2048, 256)), _towers(gn=False, bias=True), openmmlab_retina),
        "freeanchor_r50",
        {**TV_RESNET, "neck.extra_source": "C5", "predictor.anchors.order": "scale"},
        meta={"config": "bbox_head=dict(type='FreeAnchorRetinaHead', num_classes=80)"},
    ),
    "mmdet dyhead simple": Release(
        (openmmlab_resnet, _mm(C3, (256, 256), "neck.0"), openmmlab_dyhead, lambda: openmmlab_points("atss")),
        "dyhead_atss_r50_simple",
        {**TV_RESNET, "predictor.center_offset": 0.0, "head.high_offset": "prefix"},
    ),
    "mmdet dyhead reproduction": Release(
        (openmmlab_resnet, _mm(C3, (256, 256), "neck.0"), openmmlab_dyhead, lambda: openmmlab_points("atss", 1)),
        "dyhead_atss_r50_reproduction",
        {**MSRA, "preprocess.pad_multiple": 128, "predictor.center_offset": 0.5, "head.high_offset": "prefix"},
    ),
    "mmdet dyhead swin-l": Release(
        (swin_large, _mm(SWIN_L, (256, 256), "neck.0"), openmmlab_dyhead, lambda: openmmlab_points("atss", 1)),
        "dyhead_atss_swinl",
        {**TORCHVISION, "preprocess.pad_multiple": 128, "predictor.center_offset": 0.5, "head.high_offset": "prefix"},
    ),
    "mmdet faster_rcnn_r50": Release(
        (openmmlab_resnet, _mm(C2, ()), openmmlab_two_stage),
        "faster_rcnn_r50",
        {**TV_RESNET, "predictor.rpn.ignore_padding": False},
    ),
    "mmdet faster_rcnn_r101": Release(
        (lambda: openmmlab_resnet((3, 4, 23, 3)), _mm(C2, ()), openmmlab_two_stage),
        "faster_rcnn_r50",
        {**TV_RESNET, "backbone.name": "resnet101", "predictor.rpn.ignore_padding": False},
    ),
    "mmdet mask_rcnn_r50": Release(
        (openmmlab_resnet, _mm(C2, ()), openmmlab_two_stage, openmmlab_masks),
        "mask_rcnn_r50",
        {**TV_RESNET, "predictor.rpn.ignore_padding": False, "data.masks": True},
    ),
    **{
        f"mmdet mask_rcnn swin-{size}": Release(
            (
                lambda depth=depth: openmmlab_swin(depth),
                _mm((96, 192, 384, 768), ()),
                openmmlab_two_stage,
                openmmlab_masks,
            ),
            "mask_rcnn_swint",
            {**TORCHVISION, "predictor.rpn.ignore_padding": False, "data.masks": True, "backbone.name": name},
        )
        for size, depth, name in (
            ("t", 6, "swin_tiny_patch4_window7_224.ms_in1k"),
            ("s", 18, "swin_small_patch4_window7_224"),
        )
    },
    "authors dyhead atss": Release(
        (_body(WRAPPED), _d2(WRAPPED, C3, (256, 256)), authors_dyhead, authors_atss),
        "dyhead_atss_r50_official",
        {
            **MSRA,
            "preprocess.pad_multiple": 128,
            "predictor.center_offset": 0.5,
            "head.high_offset": "prefix",
            "neck.relu_before_extra": True,
            "predictor.postprocess.rank": "score",
        },
    ),
    "authors dyhead retinanet": Release(
        (_body(WRAPPED), _d2(WRAPPED, C3, (256, 256)), authors_dyhead, detectron_retina),
        "dyhead_retinanet_r50",
        {
            **MSRA,
            "preprocess.pad_multiple": 128,
            "neck.extra_source": "P5",
            "head.attention.high_offset": "prefix",
            "predictor.anchors.order": "ratio",
        },
    ),
    "authors dyhead swin-t": Release(
        (swin_tiny, _d2(WRAPPED, SWIN_T, (256, 256)), authors_dyhead, authors_atss),
        "dyhead_atss_swint",
        {**TORCHVISION, "preprocess.pad_multiple": 128, "predictor.center_offset": 0.5, "head.high_offset": "prefix"},
    ),
    "authors dyhead faster_rcnn": Release(
        (_body(WRAPPED), _d2(WRAPPED, C2, (), 2), authors_dyhead, detectron_two_stage),
        "dyhead_faster_rcnn_r50",
        {**MSRA, "preprocess.pad_multiple": 64, "head.high_offset": "prefix", "predictor.rpn.ignore_padding": False},
    ),
    "detectron2 faster_rcnn": Release(
        (_body(BARE), _d2(BARE, C2, (), 2), detectron_two_stage),
        "faster_rcnn_r50",
        {**MSRA, "preprocess.pad_multiple": 32, "predictor.rpn.ignore_padding": False},
    ),
    "detectron2 retinanet": Release(
        (_body(BARE), _d2(BARE, C3, (2048, 256)), detectron_retina),
        "retinanet_r50",
        {
            **MSRA,
            "neck.extra_source": "C5",
            "neck.relu_before_extra": True,
            "predictor.anchors.order": "ratio",
            "predictor.coder.clamp": "upper",
            "predictor.postprocess.clip": "after",
        },
    ),
    "fcos": Release((_body(BARE), _d2(BARE, C3, (2048, 256)), cvpods_plain, cvpods_predictors), "fcos_r50", CVPODS),
    **{
        f"fcos {'dynamic' if dynamic else 'fixed'} D{depth}": Release(
            (
                _body(BARE),
                _d2(BARE, C3, (2048, 256)),
                lambda depth=depth, dynamic=dynamic: cvpods_nodes(depth, dynamic=dynamic),
                cvpods_predictors,
            ),
            "fcos_d8_dyn" if dynamic else "fcos_d8",
            {
                **CVPODS,
                "head.depth": depth,
                **({"head.norm_stats": "published", "head.activation.tau": 1.5} if dynamic else {}),
            },
        )
        for depth in (4, 8)
        for dynamic in (False, True)
    },
}


def marked(shapes: Shapes) -> dict[str, Tensor]:
    """Every tensor holds its own number in all places, without using memory for them."""
    return {name: torch.tensor(float(number)).expand(shape) for number, (name, shape) in enumerate(shapes.items(), 1)}


def random_weights(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Values that keep activations in range: small weights, running variances of 1, the rest near 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            value *= (2 / (value[0].numel() or 1)) ** 0.5
        elif name.endswith("running_var"):
            value = value.abs() * 0.1 + 1
        elif name.endswith(("weight", "scale")):
            value = 1 + 0.1 * value
        else:
            value = 0.1 * value
        weights[name] = value
    return weights
