"""Parameters and multiply-adds of the backbones, on the meta device.

Parameters are exact and multiply-adds within 0.1 % of what is known of the networks that DyHead was published with, at
800x1344. Swin's include its output norms, the products of attention and the padding of its windows.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from dyndet.cli.compose import compose_command
from dyndet.models.backbones.timm import TimmBackbone
from dyndet.ops.flops import GIGA, mac_counter

CONF = Path(__file__).parents[2] / "conf" / "backbone"
R101 = "backbone.name=resnet101.tv_in1k"
X101 = "backbone.name=resnext101_64x4d.tv_in1k"
DEFORMABLE = "backbone.deformable_stages=[3,4,5]"
FIGURES = {
    "resnet50": (23_508_032, 87.581),
    "resnet50_caffe": (23_508_032, None),
    f"resnet50 {R101}": (42_500_160, None),
    "resnet50_caffe backbone.name=resnet101": (42_500_160, None),
    f"resnet50 {X101}": (81_406_272, None),
    f"resnet50 {X101} {DEFORMABLE}": (89_120_874, None),
    "swin_tiny": (27_520_506, 99.094),
    "swin_tiny backbone.name=swin_small_patch4_window7_224.ms_in1k": (48_838_410, None),
    "swin_tiny backbone.name=swin_large_patch4_window12_384.ms_in22k": (195_200_820, 812.573),
}


def backbone_of(name: str, *overrides: str) -> TimmBackbone:
    line = f"backbone={name}".split()
    config: DictConfig = compose_command("train", [*line, "backbone.weights=none", *overrides]).backbone
    with torch.device("meta"):
        return instantiate(config).eval()


def gigamacs(backbone: TimmBackbone, size: tuple[int, int] = (800, 1344)) -> float:
    with torch.no_grad(), mac_counter() as counter:
        backbone(torch.empty(1, 3, *size, device="meta"))
    return counter.get_total_flops() / 2 / GIGA


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_published_figures(name: str) -> None:
    parameters, macs = FIGURES[name]
    backbone = backbone_of(name)
    assert sum(p.numel() for p in backbone.parameters()) == parameters
    if macs is not None:
        assert gigamacs(backbone) == pytest.approx(macs, rel=1e-3)


def test_what_deformable_stages_cost() -> None:
    """The whole detectors of the paper differ by 513.937 - 479.972 G: the offset convolutions."""
    extra = gigamacs(backbone_of("resnet50", X101, DEFORMABLE)) - gigamacs(backbone_of("resnet50", X101))
    assert extra == pytest.approx(513.937 - 479.972, rel=1e-3)


FILES = [path.stem for path in CONF.glob("*.yaml") if "yolo" not in path.stem]
NAMES = ["swin_tiny backbone.name=convnext_tiny.fb_in1k", "tiny backbone.name=tf_efficientnet_b1.aa_in1k"]


@pytest.mark.parametrize("name", sorted({*FILES, *FIGURES, *NAMES}))
def test_every_configured_backbone_covers_its_input(name: str) -> None:
    """Maps of ceil(side / stride) at a size that nothing divides, as necks and heads rely on; YOLO's canvas fits."""
    backbone = backbone_of(name)
    maps = backbone(torch.empty(1, 3, 203, 331, device="meta"))
    sizes = [(-(-203 // s), -(-331 // s)) for s in backbone.strides]
    assert [tuple(x.shape[1:]) for x in maps] == [(c, *size) for c, size in zip(backbone.channels, sizes, strict=True)]
