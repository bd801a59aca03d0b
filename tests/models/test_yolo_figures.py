"""YOLOv7 cascades: parameters and multiply-adds as published, and folded networks that compute the same."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from dyndet.api import build_detector
from dyndet.errors import UserError
from dyndet.metrics.static import StaticCosts
from dyndet.models.backbones.yolov7 import YoloBackbone
from dyndet.models.backbones.yolov7_blocks import ConvNorm, RepConv, SpaceToDepth
from dyndet.models.detectors.dynamic import DynamicDetector
from dyndet.models.fuse import fused
from dyndet.models.necks.yolov7_pan import YoloNeck
from dyndet.models.predictors.implicit import ImplicitConv
from dyndet.ops.flops import MacCounter

MODELS = ("yolov7", "yolov7x", "yolov7w6")
SIZES = {"yolov7": 640, "yolov7x": 640, "yolov7w6": 1280}


@cache
def cascade(model: str) -> DynamicDetector:
    """The cascade with its router, without memory for its weights."""
    with torch.device("meta"):
        detector = build_detector(f"dy_{model}", ["+router=exact"])
    assert isinstance(detector, DynamicDetector)
    return detector


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def implicit(module: nn.Module) -> int:
    """The learned vectors: the published folding leaves them in place, so published counts hold them."""
    return sum(x.add.numel() + x.scale.numel() for x in module.modules() if isinstance(x, ImplicitConv))


@pytest.mark.parametrize(
    ("model", "whole", "folded", "router"),
    [
        ("yolov7", 80_621_333, 79_191_765, 2_075_041),
        ("yolov7x", 151_093_149, 151_027_853, 3_241_801),
        ("yolov7w6", 147_364_049, 147_300_177, 1_894_753),
    ],
)
def test_parameters_are_the_published_ones(model: str, whole: int, folded: int, router: int) -> None:
    detector = cascade(model)
    assert parameters(detector) == whole
    assert parameters(fused(detector)) + implicit(detector) == folded
    assert detector.router is not None and parameters(detector.router) == router


@pytest.mark.parametrize(
    ("model", "backbone", "links", "detector"),
    [
        ("yolov7", (13_371_808, 13_361_792), 3_300_928, (24_250_874, 23_546_106)),
        ("yolov7x", (20_275_272, 20_262_400), 5_156_560, (51_072_122, 51_052_346)),
        ("yolov7w6", (35_988_608, 35_975_104), 4_609_664, (34_441_208, 34_422_776)),
    ],
)
def test_parameters_of_the_parts(model: str, backbone: tuple[int, int], links: int, detector: tuple[int, int]) -> None:
    whole = cascade(model)
    folded = fused(whole)
    assert parameters(whole.links) == parameters(folded.links) == links
    for name in ("first", "second"):
        part, short = whole.get_submodule(name), folded.get_submodule(name)
        assert (parameters(part.backbone), parameters(short.backbone)) == backbone
        rest = parameters(short.neck) + parameters(short.predictor) + implicit(part)
        assert (parameters(part.neck) + parameters(part.predictor), rest) == detector


def counted(detector: DynamicDetector, model: str, route: str) -> dict[str, int]:
    counts = MacCounter(detector).count((SIZES[model], SIZES[model]), route=route)
    del counts["total"]
    return counts


@pytest.mark.parametrize(
    ("model", "backbone", "links", "detector", "unfolded", "router"),
    [
        ("yolov7", 33_069_465_600, 5_531_238_400, 19_186_073_600, 19_815_219_200, 2_074_320),
        ("yolov7x", 50_334_924_800, 8_642_560_000, 44_501_913_600, 44_501_913_600, 3_240_900),
        ("yolov7w6", 110_729_625_600, 10_276_044_800, 69_129_011_200, 69_129_011_200, 1_894_064),
    ],
)
def test_multiply_adds_of_every_part(
    model: str, backbone: int, links: int, detector: int, unfolded: int, router: int
) -> None:
    whole = cascade(model)
    for version, expected in ((fused(whole), detector), (whole, unfolded)):
        easy, hard = counted(version, model, "first"), counted(version, model, "second")
        assert easy["backbone"] == hard["backbone"] == hard["backbone2"] == backbone
        assert easy["router"] == hard["router"] == router
        assert hard["links"] == links
        for counts in (easy, hard):
            assert counts["neck"] + counts["predictor"] == expected
        assert set(hard) - set(easy) == {"links", "backbone2"}


PUBLISHED = {  # GFLOPs (2 per multiply-add) with 10, 50, 90 and 100 % of the images hard
    "yolov7": (112.4, 143.2, 174.0, 181.7),
    "yolov7x": (201.7, 248.9, 296.1, 307.9),
    "yolov7w6": (384.2, 480.8, 577.4, 601.6),
}


@pytest.mark.parametrize("model", MODELS)
def test_every_published_row(model: str) -> None:
    detector = fused(cascade(model))
    easy, hard = (2 * sum(counted(detector, model, route).values()) / 1e9 for route in ("first", "second"))
    for share, published in zip((0.1, 0.5, 0.9, 1.0), PUBLISHED[model], strict=True):
        assert easy + share * (hard - easy) == pytest.approx(published, abs=0.35)


@pytest.mark.parametrize(
    ("model", "whole"), [("yolov7", 37_622_682), ("yolov7x", 71_347_394), ("yolov7w6", 70_429_816)]
)
def test_plain_networks(model: str, whole: int) -> None:
    with torch.device("meta"):
        detector = build_detector(model)
    assert parameters(detector) == whole
    with torch.device("meta"):
        again = build_detector(model, ["predictor.implicit=false"])
    deployed = {"yolov7": 36_905_341, "yolov7x": 71_311_741, "yolov7w6": 70_394_300}[model]
    assert parameters(fused(again)) == deployed


def settle(module: nn.Module) -> nn.Module:
    """Norms with statistics and parameters of their own, so that folding has something to do."""
    generator = torch.Generator().manual_seed(3)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor, low, high in (
                (layer.weight, 0.5, 1.5), (layer.bias, -0.5, 0.5), (layer.running_mean, -0.5, 0.5),
                (layer.running_var, 0.5, 1.5),
            ):  # fmt: skip
                assert tensor is not None
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return module.double().eval()


@pytest.mark.parametrize("block", [ConvNorm(4, 6, 3, 2), RepConv(4, 6), ImplicitConv(4, 6)], ids=str)
def test_folded_blocks_compute_the_same(block: nn.Module) -> None:
    settle(block)
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    folded = fused(nn.Sequential(block))
    assert not any(isinstance(layer, nn.BatchNorm2d | ImplicitConv) for layer in folded.modules())
    torch.testing.assert_close(folded(x), block(x), rtol=1e-12, atol=1e-12)


def test_a_folded_cascade_computes_the_same() -> None:
    torch.manual_seed(0)
    detector = settle(build_detector("shapes_dy_yolo", ["+router=exact"]))
    assert isinstance(detector, DynamicDetector)
    folded = fused(detector)
    images = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    for route in ("first", "second"):
        for ours, theirs in zip(folded.raw_outputs(images, route), detector.raw_outputs(images, route), strict=True):
            torch.testing.assert_close(ours["pred"], theirs["pred"], rtol=1e-9, atol=1e-9)


def test_space_to_depth_order() -> None:
    x = torch.arange(4.0).view(1, 1, 2, 2)  # 0 1 / 2 3
    assert SpaceToDepth()(x).flatten().tolist() == [0, 2, 1, 3]  # offsets (row, column): 00, 10, 01, 11


def test_width_and_depth_scale_a_network() -> None:
    backbone = YoloBackbone(
        stem=(32, 64), stages=[[128, 64, 256], [256, 128, 512]], num_outputs=2, width=0.25, depth=0.5
    )
    assert backbone.channels == [64, 128] and backbone.strides == [4, 8]
    assert [len(body.chain) for body in list(backbone.bodies)[1:]] == [2, 2]  # type: ignore[arg-type]
    neck = YoloNeck(backbone.channels, backbone.strides, widths=(128, 256), branches=(128, 256), width=0.25, depth=0.5)
    maps = neck(backbone(torch.zeros(1, 3, 32, 48)))
    assert [tuple(x.shape) for x in maps] == [(1, 64, 8, 12), (1, 128, 4, 6)] and neck.channels == [64, 128]


MIXES = [
    ["backbone=yolov7_tiny", "neck=yolov7", "predictor=yolo_p5_small"],
    ["backbone=yolov7_tiny", "neck=fpn_small", "predictor=fcos_small"],
    ["backbone=yolov7_tiny", "neck=yolov7", "predictor=yolo_p5_small", "detector=dynamic", "detector.first_link=0"],
]


@pytest.mark.parametrize("parts", MIXES, ids="-".join)
def test_sizes_between_strides_are_refused_or_padded(parts: list[str]) -> None:
    detector = build_detector(None, ["head=none", *parts]).eval()
    assert detector.size_divisor == 32
    with pytest.raises(ValueError, match=r"100 x 84 pixels.*stride 32"):
        detector.losses(torch.zeros(2, 3, 100, 84), [])
    assert len(detector.detect([torch.zeros(3, 100, 84)])) == 1
    static = StaticCosts(detector)
    assert static((100, 84), routed=False) == static((128, 96), routed=False)


def test_other_networks_take_any_size() -> None:
    detector = build_detector(None, ["head=plain_small"]).eval()
    assert detector.size_divisor == 1
    assert len(detector.detect(torch.zeros(1, 3, 50, 37))) == 1
    static = StaticCosts(detector)
    assert static((50, 37), routed=False) != static((64, 64), routed=False)


def test_the_neck_on_another_backbone() -> None:
    parts = ["neck=yolov7", "neck.width=0.125", "neck.depth=0.5", "head=none", "predictor=yolo_p5_small"]
    detector = build_detector(None, parts)
    assert detector.size_divisor == 32
    assert detector.strides == [8, 16, 32]
    assert len(detector.eval().detect([torch.zeros(3, 50, 37)])) == 1


def test_a_divisor_below_the_stride_is_refused() -> None:
    parts = ["preprocess=yolo", "backbone=yolov7w6", "neck=yolov7w6", "head=none", "predictor=yolo_p6"]
    with torch.device("meta"):
        with pytest.raises(UserError, match=r"preprocess\.pad_multiple=32.*set preprocess\.pad_multiple=64"):
            build_detector(None, parts)
        assert build_detector(None, [*parts, "preprocess.pad_multiple=128"]).size_divisor == 64


def test_a_neck_that_does_not_fit_says_so() -> None:
    with pytest.raises(ValueError, match=r"neck\.widths"):
        YoloNeck([64, 128], [8, 16])
