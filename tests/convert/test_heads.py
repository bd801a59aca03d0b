"""Converted heads against plain re-expressions of the sources' forward passes, by the sources' names."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from released_layouts import RELEASES, authors_dyhead, cvpods_nodes, random_weights
from torch import Tensor
from torchvision.ops import deform_conv2d

from dyndet.cli.compose import build
from dyndet.convert import read_release

Weights = dict[str, Tensor]
SIZES = [(9, 12), (5, 6), (3, 3), (2, 2), (1, 1)]


def features(channels: int = 256) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, channels, *size, generator=generator) for size in SIZES]


def converted_head(folder: Path, name: str, weights: Weights) -> torch.nn.Module:
    release = RELEASES[name]
    file = folder / "release.pth"
    others = {key: torch.zeros(()).expand(shape) for key, shape in release.shapes.items() if key not in weights}
    torch.save({"model": others | weights}, file)
    converted = read_release(file)
    with torch.device("meta"):
        head = build(converted.config.head, channels=256)
    mine = {key.removeprefix("head."): value for key, value in converted.state_dict.items() if key.startswith("head.")}
    head.load_state_dict(mine, strict=True, assign=True)
    return head


def resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=True)


def node(levels: list[Tensor], weights: Weights, name: str, *, dynamic: bool) -> list[Tensor]:
    """Scale step with neighbours l - 1 (index 0) and l + 1 (index 1), then the residual block."""

    def gate(x: Tensor, key: str) -> Tensor:
        if not dynamic:
            return torch.ones(())
        tau = 1.5
        logits = F.conv2d(x, weights[f"{key}.weight"], weights[f"{key}.bias"], padding=1)
        return ((torch.tanh(logits - tau) + math.tanh(tau)) / (1 + math.tanh(tau))).clamp(min=0)

    def sent(x: Tensor, index: int) -> Tensor:
        path = f"{name}.dynamic_convs.{index}.convs" if dynamic else f"{name}.convs.{index}"
        y = F.conv2d(x, weights[f"{path}.0.weight"], weights[f"{path}.0.bias"], padding=1, groups=x.shape[1])
        y = F.group_norm(y, 32, weights[f"{path}.1.weight"], weights[f"{path}.1.bias"])
        return y * gate(x, f"{name}.dynamic_convs.{index}.gate.gate_conv")

    def block(x: Tensor, number: int) -> Tensor:
        key = f"{name}.depth_module.bottleneck.conv{number}"
        y = F.conv2d(x, weights[f"{key}.weight"], padding=1)
        return F.group_norm(y, 32, weights[f"{key}.norm.weight"], weights[f"{key}.norm.bias"])

    outputs = []
    scale = weights[f"{name}.scale_weight"] if dynamic else 1.0
    for level, x in enumerate(levels):
        s = weights[f"{name}.output_weight"] * x
        for index, source in enumerate((level - 1, level + 1)):
            if 0 <= source < len(levels):
                s = s + scale * resized(sent(levels[source], index), x)
        residual = block(block(s, 1).relu(), 2)
        outputs.append((s + residual * gate(s, f"{name}.depth_module.gate.gate_conv")).relu())
    return outputs


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "fixed"])
def test_fine_grained(dynamic: bool, tmp_path: Path) -> None:
    weights = random_weights(dict(cvpods_nodes(4, dynamic=dynamic)))
    for name in weights:
        if name.endswith("gate_conv.bias"):
            weights[name] += 1.0  # half open
    head = converted_head(tmp_path, f"fcos {'dynamic' if dynamic else 'fixed'} D4", weights).train()
    with torch.no_grad():
        output = head(features())
        for ours, branch in ((output.cls, "cls_subnet"), (output.reg, "bbox_subnet")):
            theirs = features()
            for index in range(4):
                theirs = node(theirs, weights, f"head.{branch}.{index}", dynamic=dynamic)
            for mine, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(mine, other, atol=1e-3, rtol=1e-3)


def dyhead_block(levels: list[Tensor], weights: Weights, name: str) -> list[Tensor]:
    """As released: the offsets of the coarser map are the first values of a buffer that was meant for this level."""

    def sampled(x: Tensor, index: int, offset: Tensor, mask: Tensor) -> Tensor:
        key, stride = f"{name}.DyConv.{index}", 2 if index == 2 else 1
        height, width = (x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1
        offset, mask = (
            part.flatten(1)[:, : count * height * width].view(len(x), count, height, width)
            for part, count in ((offset, 18), (mask, 9))
        )
        y = deform_conv2d(
            x, offset, weights[f"{key}.conv.weight"], weights[f"{key}.conv.bias"], stride=stride, padding=1, mask=mask
        )
        return F.group_norm(y, 16, weights[f"{key}.bn.weight"], weights[f"{key}.bn.bias"])

    def hard_sigmoid(x: Tensor) -> Tensor:
        return F.relu6(x + 3) / 6

    outputs = []
    for level, x in enumerate(levels):
        both = F.conv2d(x, weights[f"{name}.offset.weight"], weights[f"{name}.offset.bias"], padding=1)
        offset, mask = both[:, :18].contiguous(), both[:, 18:].sigmoid()
        found = [sampled(x, 1, offset, mask)]
        if level > 0:
            found.append(sampled(levels[level - 1], 2, offset, mask))
        if level < len(levels) - 1:
            found.append(resized(sampled(levels[level + 1], 0, offset, mask), x))
        key = f"{name}.AttnConv.1"
        attention = [
            hard_sigmoid(
                F.conv2d(y.mean((2, 3), keepdim=True), weights[f"{key}.weight"], weights[f"{key}.bias"]).relu()
            )
            for y in found
        ]
        y = torch.stack([a * f for a, f in zip(attention, found, strict=True)]).mean(0)
        hidden = F.linear(y.mean((2, 3)), weights[f"{name}.relu.fc.0.weight"], weights[f"{name}.relu.fc.0.bias"]).relu()
        t = F.linear(hidden, weights[f"{name}.relu.fc.2.weight"], weights[f"{name}.relu.fc.2.bias"])
        a1, b1, a2, b2 = (hard_sigmoid(t) - 0.5)[:, :, None, None].split(256, 1)
        outputs.append(torch.maximum((a1 * 2 + 1) * y + b1, a2 * 2 * y + b2))
    return outputs


def test_authors_dyhead(tmp_path: Path) -> None:
    weights = random_weights(dict(authors_dyhead()))
    head = converted_head(tmp_path, "authors dyhead atss", weights)
    with torch.no_grad():
        theirs = features()
        for index in range(6):
            theirs = dyhead_block(theirs, weights, f"backbone.dyhead_tower.{index}")
        for mine, other in zip(head(features()).cls, theirs, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-3, rtol=1e-3)
