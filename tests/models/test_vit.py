"""Plain ViTs as backbones: one map of all blocks at any size, weights, freezing, multiply-adds, whole detectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_detectors import targets
from torch import nn

from dyndet import build_detector
from dyndet.errors import UserError
from dyndet.models.backbones.stages import timm_stages
from dyndet.models.backbones.timm import TimmBackbone
from dyndet.ops.flops import mac_counter

# Class token and fixed size; registers; registers, no class token and fixed size; rotary positions and registers.
NAMES = ["vit_tiny_patch16_224", "test_vit2", "test_vit3", "vit_small_patch16_dinov3"]


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's ViTs, four blocks deep and 32 channels wide."""
    small = {"embed_dim": 32, "depth": 4, "num_heads": 2}
    original = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **kw: original(name, **small, **kw))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("shallow")
def test_it_is_timms_own_at_any_size(name: str, tmp_path: Path) -> None:
    """The map of the last block; images are padded to whole patches, and the model is asked for the padded size."""
    torch.manual_seed(0)
    whole: Any = timm.create_model(name, dynamic_img_size=True, num_classes=7).eval()
    torch.save(whole.state_dict(), tmp_path / "vit.pth")
    backbone = TimmBackbone(name, strides=(16,), weights=tmp_path / "vit.pth").eval()
    assert (backbone.channels, backbone.strides) == ([32], [16])
    images = torch.randn(2, 3, 67, 90)
    (x,) = backbone(images)
    padded = nn.functional.pad(images, (0, 6, 0, 13))
    wanted = whole.forward_intermediates(padded, indices=1, norm=False, intermediates_only=True)[0]
    assert x.shape == (2, 32, 5, 6) and torch.allclose(x, wanted, atol=1e-6)
    assert len(backbone.get_submodule("body.model.blocks")) == 4  # type: ignore[arg-type]


@pytest.mark.usefixtures("shallow")
def test_patches_of_14_pixels() -> None:
    backbone = TimmBackbone("vit_small_patch14_reg4_dinov2", strides=(14,)).eval()
    assert backbone(torch.zeros(1, 3, 70, 30))[0].shape == (1, 32, 5, 3)


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("name", NAMES)
def test_stem_and_blocks_freeze_one_by_one(name: str) -> None:
    """The stem is all that precedes the blocks, parameters that belong to no layer included."""
    for stages in (-1, 0, 2, 4):
        model: Any = TimmBackbone(name, strides=(16,), frozen_stages=stages).train().get_submodule("body.model")
        training = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        blocks = {int(key.split(".")[1]) for key in training if key.startswith("blocks.")}
        assert blocks == set(range(max(stages, 0), 4))
        assert bool(training - {key for key in training if key.startswith("blocks.")}) == (stages < 0)
        assert [block.training for block in model.blocks] == [index >= stages for index in range(4)]
    with pytest.raises(UserError, match=r"frozen_stages=5: this backbone has 4 stages"):
        TimmBackbone(name, strides=(16,), frozen_stages=5)


def test_multiply_adds_count_the_products_of_attention() -> None:
    """Per block 4 N C^2 for queries, keys, values and output, 2 N^2 C for attention, 8 N C^2 for the MLP."""
    with torch.device("meta"):
        backbone = TimmBackbone("vit_tiny_patch16_224", strides=(16,)).eval()
    patches, tokens, width = 5 * 6, 5 * 6 + 1, 192
    with torch.no_grad(), mac_counter() as counter:
        backbone(torch.empty(1, 3, 67, 90, device="meta"))
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    assert counter.get_total_flops() / 2 == patches * 3 * 16**2 * width + 12 * block


@pytest.mark.parametrize(
    ("neck", "head", "predictor", "strides"),
    [
        ("simple_pyramid", "dyhead_small", "fcos_small", [8, 16, 32, 64, 128]),
        ("simple_pyramid_small", "fine_grained_small", "retinanet_small", [8, 16, 32]),
        ("simple_pyramid_p2", "none", "faster_rcnn_small detector=two_stage", [4, 8, 16, 32, 64]),
        ("fpn_small", "plain_small", "atss_small", [16]),
    ],
)
def test_detectors_train_all_of_it(neck: str, head: str, predictor: str, strides: list[int]) -> None:
    torch.manual_seed(0)
    parts = f"backbone=vit_small neck={neck} head={head} predictor={predictor}"
    small = "backbone.name=test_vit2 backbone.weights=none neck.channels=16"
    detector = build_detector(None, f"{parts} {small}".split()).train()
    images = [torch.rand(3, 64, 64), torch.rand(3, 49, 57)]
    losses = detector.losses(images, targets(2))
    losses.total.backward()
    assert not [key for key, p in detector.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    still = [key for key, p in detector.backbone.named_parameters() if p.grad is None or not p.grad.any()]  # type: ignore[union-attr]
    assert detector.strides == strides and not still
    for image, found in zip(images, detector.eval().detect(images), strict=True):
        assert (found.boxes[:, 2:] <= torch.tensor([image.shape[2], image.shape[1]])).all()


def test_what_a_vit_cannot_do() -> None:
    with pytest.raises(UserError, match=r"has strides \[16\], .* set backbone.strides=\[16\] and neck=simple_pyramid"):
        TimmBackbone("test_vit")
    with pytest.raises(UserError, match="VisionTransformer cannot be run stage by stage"):
        timm_stages(TimmBackbone("test_vit", strides=(16,)).body)
