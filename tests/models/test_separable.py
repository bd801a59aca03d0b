"""EfficientDet's head: padding, batch norms of the levels, and the figures of EfficientDet-D1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from torch import Tensor, nn

from dyndet.cli.compose import compose_command
from dyndet.models.heads.separable import SeparableHead
from dyndet.models.predictors.maps import last_conv
from dyndet.ops.flops import mac_counter

SHAPES = [(12, 16), (6, 8), (3, 4)]


def pyramid() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 8, *shape, generator=generator) for shape in SHAPES]


def half_padded() -> list[Tensor]:
    valid = [torch.ones(2, 1, *shape, dtype=torch.bool) for shape in SHAPES]
    for mask, (_, width) in zip(valid, SHAPES, strict=True):
        mask[1, :, :, width // 2 :] = False
    return valid


def head() -> SeparableHead:
    torch.manual_seed(0)
    head = SeparableHead(8, num_convs=2, num_levels=3)
    for layer in head.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)  # would fill the padding
    return head


def test_levels_share_convolutions_but_not_norms() -> None:
    made: Any = head()
    features = pyramid()
    made.train()(features)
    made.eval()
    x = features[1]
    for i in range(2):
        depthwise, pointwise = made.cls.convs[i]
        norm = made.cls.norms[1][i]
        assert depthwise.groups == 8 and depthwise.bias is None and pointwise.bias is None
        x = F.conv2d(F.conv2d(x, depthwise.weight, padding=1, groups=8), pointwise.weight)
        mean, variance, scale, shift = (
            t.view(1, -1, 1, 1) for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        x = (x - mean) / (variance + 1e-3).sqrt() * scale + shift
        x = x * x.sigmoid()
    outputs = made(features)
    assert torch.allclose(outputs.cls[1], x, atol=1e-5)
    assert not torch.allclose(outputs.reg[1], x, atol=1e-2)
    seen = [tuple(norms[0].running_mean.tolist()) for norms in made.cls.norms]
    assert len(set(seen)) == 3


def test_padding_does_not_change_what_is_predicted() -> None:
    made = head()
    made.train()(pyramid())
    made.eval()
    valid = half_padded()
    padded = made([x * mask for x, mask in zip(pyramid(), valid, strict=True)], valid)
    cropped = made([x[1:, :, :, : x.shape[3] // 2] for x in pyramid()])
    for a, b in zip(padded.cls + padded.reg, cropped.cls + cropped.reg, strict=True):
        assert torch.allclose(a[1:, :, :, : b.shape[3]], b, atol=1e-5)
        assert not a[1, :, :, b.shape[3] :].any()


def test_norms_in_training_see_valid_positions_only() -> None:
    """Statistics, outputs and gradients of a batch whose second half is padding are those of its first half."""
    a, b = head().train(), head().train()
    features = [x.requires_grad_() for x in pyramid()]
    valid = [torch.ones_like(x[:, :1], dtype=torch.bool) for x in features]
    for mask in valid:
        mask[1] = False
    padded, alone = a(features, valid), b([x[:1] for x in features])
    for x, y in zip(padded.cls + padded.reg, alone.cls + alone.reg, strict=True):
        assert torch.allclose(x[:1], y, atol=1e-5) and not x[1].any()
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.allclose(x, y, atol=1e-6), name
    weights = [torch.randn_like(x) for x in alone.cls]
    gradients = [torch.autograd.grad([x[:1] for x in out.cls], features, weights) for out in (padded, alone)]
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(*gradients, strict=True))


def test_a_pyramid_of_other_levels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 levels: set head\.num_levels"):
        head()(pyramid()[:2])


def test_efficientdet_d1() -> None:
    """Published: 6.6 M parameters, 6.1 G multiply-adds at 640x640.

    A well-known implementation counts 6,625,898 with 90 classes; 3,872 of them are biases before batch norms, which
    have no effect and are left out here. Convolutions alone are 6.0 G; one more for each normalised value gives 6.1 G.
    """
    config = compose_command("train", ["+experiment=efficientdet_d1", "backbone.weights=none"])
    normalised = 0

    def count(_: nn.Module, __: Any, output: Tensor) -> None:
        nonlocal normalised
        normalised += output.numel()

    with torch.device("meta"):
        backbone = instantiate(config.backbone)
        neck = instantiate(config.neck)(backbone.channels, backbone.strides)
        separable = instantiate(config.head)(neck.channels)
        cls, box = (last_conv(neck.channels, 9 * outputs, 3, separable=True) for outputs in (90, 4))
        network = nn.ModuleList([backbone, neck, separable, cls, box]).eval()
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.register_forward_hook(count)
        with torch.no_grad(), mac_counter() as counter:
            output = separable(neck(backbone(torch.empty(1, 3, 640, 640))))
            for x, y in zip(output.cls, output.reg, strict=True):
                cls(x)
                box(y)
    nodes, laterals, towers = 4 * 8, 6, 2 * 3
    assert sum(p.numel() for p in network.parameters()) + 88 * (nodes + laterals + towers) == 6_625_898
    macs = counter.get_total_flops() / 2
    assert macs == pytest.approx(6.0034e9, rel=1e-4)
    assert round((macs + normalised) / 1e9, 1) == 6.1
