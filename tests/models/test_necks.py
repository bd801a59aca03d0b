"""Necks: what they sum, their extra levels, published figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from dyndet.cli.compose import compose_command
from dyndet.models.necks.bifpn import BiFPN, Fusion
from dyndet.models.necks.fpn import FPN
from dyndet.models.necks.simple_pyramid import SimplePyramid
from dyndet.ops.flops import GIGA, mac_counter

RESNET, SWIN_TINY, SWIN_LARGE = (512, 1024, 2048), (192, 384, 768), (384, 768, 1536)


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


def test_fpn_pools_every_second_position() -> None:
    torch.manual_seed(0)
    neck = FPN([2, 3], [8, 16], channels=4, extra="pool", extra_levels=2)
    assert neck.strides == [8, 16, 32, 64] and not list(neck.extra.parameters())
    outputs = neck([torch.randn(1, 2, 9, 12), torch.randn(1, 3, 5, 6)])
    assert torch.equal(outputs[2], outputs[1][:, :, ::2, ::2])
    assert torch.equal(outputs[3], outputs[1][:, :, ::4, ::4])
    with pytest.raises(ValueError, match="extra must be"):
        FPN([2, 3], [8, 16], extra="max")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "channels", "overrides", "parameters", "macs"),
    [
        ("fpn", RESNET, ["neck.extra_source=P5"], 3_868_672, 17.066),
        ("fpn", RESNET, [], 7_997_440, None),
        ("fpn_p2", (256, *RESNET), [], 3_344_384, 60.899),
        ("fpn", SWIN_TINY, ["neck.extra_source=P5"], 3_295_232, 14.657),
        ("fpn", SWIN_LARGE, ["neck.extra_source=P5"], 3_639_296, 16.102),
        ("bifpn", (40, 112, 320), [], 387_628, None),
    ],
)
def test_published_figures(
    config: str, channels: Sequence[int], overrides: list[str], parameters: int, macs: float | None
) -> None:
    """Of the networks that DyHead was published with, at 800x1344; BiFPN's as part of EfficientDet-D1."""
    strides = [4, 8, 16, 32][-len(channels) :]
    with torch.device("meta"):
        neck = instantiate(compose_command("train", [f"neck={config}", *overrides]).neck)(channels, strides)
    assert sum(p.numel() for p in neck.parameters()) == parameters
    features = [torch.empty(1, c, 800 // s, 1344 // s, device="meta") for c, s in zip(channels, strides, strict=True)]
    with mac_counter() as counter:
        pyramid = neck(features)
    assert [x.shape[1:] for x in pyramid] == [(neck.channels, -(-800 // s), -(-1344 // s)) for s in neck.strides]
    if macs is not None:
        assert counter.get_total_flops() / 2 / GIGA == pytest.approx(macs, rel=1e-3)


def halved(x: Tensor) -> Tensor:
    """Maximum of 3x3 around every second position."""
    padded = nn.functional.pad(x, (1, 1, 1, 1), value=-torch.inf)
    return padded.unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))


def doubled(x: Tensor, like: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, : like.shape[2], : like.shape[3]]


def node_by_hand(node: Any, *inputs: Tensor) -> Tensor:
    w = node.fusion.weight.clamp(min=0)
    fused = sum(w[i] * x for i, x in enumerate(inputs)) / (w.sum() + 1e-4)
    return node.norm(node.conv(fused * fused.sigmoid()))  # type: ignore[operator]


def randomised(neck: BiFPN) -> BiFPN:
    """With weights and statistics that hide nothing, in eval mode and float64."""
    for layer in neck.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)  # type: ignore[arg-type]
            nn.init.normal_(layer.bias)
        elif isinstance(layer, Fusion) and layer.weight is not None:
            nn.init.uniform_(layer.weight, -0.5, 2.0)
    return neck.double().eval()


def test_bifpn_is_the_graph_of_the_paper() -> None:
    """Figure 2 (d), written out for C3 and C4 and levels 3 to 6, at odd sizes."""
    torch.manual_seed(0)
    neck = randomised(BiFPN([2, 3], [8, 16], channels=4, num_layers=2, num_levels=4))
    assert neck.strides == [8, 16, 32, 64] and neck.channels == 4
    c3, c4 = torch.randn(2, 2, 9, 14).double(), torch.randn(2, 3, 5, 7).double()
    p3, p4, p4_again = neck.top_down_inputs[0](c3), neck.top_down_inputs[1](c4), neck.bottom_up_inputs[0](c4)
    p5 = halved(neck.extra(c4))
    p6 = halved(p5)
    for layer in neck.layers:
        down: Any = layer.top_down
        up: Any = layer.bottom_up
        m5 = node_by_hand(down[2], p5, doubled(p6, p5))
        m4 = node_by_hand(down[1], p4, doubled(m5, p4))
        p3 = node_by_hand(down[0], p3, doubled(m4, p3))
        p4 = p4_again = node_by_hand(up[0], p4_again, m4, halved(p3))
        p5 = node_by_hand(up[1], p5, m5, halved(p4))
        p6 = node_by_hand(up[2], p6, halved(p5))
    outputs = neck([c3, c4])
    assert [x.shape[-2:] for x in outputs] == [(9, 14), (5, 7), (3, 4), (2, 2)]
    for a, b in zip(outputs, (p3, p4, p5, p6), strict=True):
        assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("fusion", ["fast", "softmax", "sum"])
def test_bifpn_trains_without_extra_levels(fusion: str) -> None:
    torch.manual_seed(0)
    neck = BiFPN([2, 4, 4], [8, 16, 32], channels=4, num_layers=2, num_levels=3, fusion=fusion)  # type: ignore[arg-type]
    assert neck.strides == [8, 16, 32]
    assert isinstance(neck.top_down_inputs[1], nn.Identity)  # the width is right already
    outputs = neck([torch.randn(2, c, s, s) for c, s in ((2, 12), (4, 6), (4, 3))])
    sum(x.square().mean() * (i + 1) for i, x in enumerate(outputs)).backward()  # type: ignore[union-attr]
    unused = [name for name, p in neck.named_parameters() if p.grad is None]
    assert not unused and any("fusion" in name for name, _ in neck.named_parameters()) == (fusion != "sum")


def test_how_maps_are_weighted() -> None:
    maps = [torch.full((1, 1, 1, 1), value) for value in (1.0, 10.0, 100.0)]
    weight = torch.tensor([2.0, -1.0, 1.0])
    expected = {
        "fast": (2 * 1 + 1 * 100) / 3.0001,
        "softmax": float((weight.exp() * torch.tensor([1.0, 10.0, 100.0])).sum() / weight.exp().sum()),
        "sum": 111.0,
    }
    for kind, value in expected.items():
        fusion = Fusion(3, kind)  # type: ignore[arg-type]
        if fusion.weight is not None:
            fusion.weight.data.copy_(weight)
        assert fusion(maps).item() == pytest.approx(value, rel=1e-6)
    with pytest.raises(ValueError, match="fusion must be"):
        Fusion(2, "mean")  # type: ignore[arg-type]


@pytest.mark.parametrize(("strides", "levels"), [([8, 32], 3), ([8, 16, 32], 2), ([8], 1)])
def test_bifpn_refuses_strides_that_do_not_fit(strides: list[int], levels: int) -> None:
    with pytest.raises(ValueError, match=r"neck\.num_levels"):
        BiFPN([4] * len(strides), strides, num_levels=levels)


def test_the_simple_pyramid_is_that_of_the_paper() -> None:
    """Every level written out of torch's functions, from a map of odd sides."""
    torch.manual_seed(0)
    neck = SimplePyramid([8], [16], channels=4).double()
    for parameter in neck.parameters():
        nn.init.normal_(parameter)
    assert neck.strides == [4, 8, 16, 32, 64] and neck.channels == 4
    x = torch.randn(2, 8, 5, 3).double()

    def norm(x: Tensor, layer: Any) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return scaled * layer.weight[:, None, None] + layer.bias[:, None, None]

    def wide(x: Tensor, layer: Any) -> Tensor:
        """Every position to 2x2 of its own."""
        return torch.einsum("bihw,iokl->bohkwl", x, layer.weight).flatten(2, 3).flatten(3) + layer.bias[:, None, None]

    p4, p8, p16, p32 = neck.levels
    first, between, gelu, second, *_ = p4  # type: ignore[misc]
    finer = wide(gelu(norm(wide(x, first), between)), second)
    sides = nn.functional.pad(x, (0, 1, 0, 1), value=-torch.inf)
    coarser = sides.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
    outputs = neck([x])
    pairs = zip([p4, p8, p16, p32], [finer, wide(x, p8[0]), x, coarser], outputs, strict=False)  # type: ignore[index]
    for level, y, output in pairs:
        layers: Any = list(level.children())[-4:]
        point, inner, cross, outer = layers
        y = norm(torch.einsum("bihw,oi->bohw", y, point.weight[..., 0, 0]), inner)
        wanted = norm(nn.functional.conv2d(y, cross.weight, padding=1), outer)
        assert torch.allclose(output, wanted, atol=1e-10)
    assert torch.equal(outputs[4], outputs[3][:, :, ::2, ::2])
    assert [x.shape[-2:] for x in outputs] == [(20, 12), (10, 6), (5, 3), (3, 2), (2, 1)]


@pytest.mark.parametrize(("config", "fine"), [("simple_pyramid", [8]), ("simple_pyramid_p2", [4, 8])])
def test_parameters_of_the_simple_pyramid(config: str, fine: list[int]) -> None:
    """Of ViT-B: d channels to c by 1x1 and 3x3 without biases, and two norms; d * d / 2 * 4 weights to double a map."""
    d, c = 768, 256
    neck = instantiate(compose_command("train", [f"neck={config}"]).neck)([d], [16])
    counted = sum(width * c + 9 * c * c + 4 * c for width in (d, d))
    counted += d // 2 * c + 9 * c * c + 4 * c + 2 * d * d + d // 2
    if 4 in fine:
        counted += d // 4 * c + 9 * c * c + 4 * c + 2 * d * d + d // 2 + 2 * (d // 2) + d * d // 2 + d // 4
    assert sum(p.numel() for p in neck.parameters()) == counted
    assert neck.strides == [*fine, 16, 32, 64, 128][: len(neck.strides)] and neck.strides[-1] == (
        64 if 4 in fine else 128
    )


def test_the_simple_pyramid_keeps_half_precision() -> None:
    neck = SimplePyramid([8], [16], channels=4, extra_levels=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = neck([torch.randn(1, 8, 4, 4)])
    assert all(x.dtype == torch.bfloat16 for x in outputs)


@pytest.mark.parametrize(
    ("in_strides", "strides", "message"),
    [
        ([8, 16], [8, 16], "reads one map, the backbone gives 2"),
        ([16], [4, 16], "must double"),
        ([14], [4, 8, 16], r"set neck.strides=\[7, 14, 28\]"),
    ],
)
def test_the_simple_pyramid_refuses_strides_that_do_not_fit(
    in_strides: list[int], strides: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SimplePyramid([8] * len(in_strides), in_strides, strides=strides)
