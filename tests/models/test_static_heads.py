"""The plain and the fixed head: what padding means to them, and that the fixed one is the twin of the dynamic one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dyndet.models.heads.fine_grained import FineGrainedHead
from dyndet.models.heads.fixed import FixedHead
from dyndet.models.heads.plain import PlainHead
from dyndet.ops.sparse import RowLayout

SHAPES = [(12, 16), (6, 8), (3, 4)]


def pyramid() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 8, *shape, generator=generator) for shape in SHAPES]


def half_padded() -> list[Tensor]:
    valid = [torch.ones(2, 1, *shape, dtype=torch.bool) for shape in SHAPES]
    for mask, (_, width) in zip(valid, SHAPES, strict=True):
        mask[1, :, :, width // 2 :] = False
    return valid


def test_a_plain_tower_does_not_see_how_much_padding_there_is() -> None:
    torch.manual_seed(0)
    head = PlainHead(8, num_convs=3, norm_groups=2)
    for parameter in head.parameters():  # biases that would fill the padding
        nn.init.normal_(parameter, std=0.3)
    valid = half_padded()
    features = [x * mask for x, mask in zip(pyramid(), valid, strict=True)]
    padded = head(features, valid)
    cropped = head([x[1:, :, :, : x.shape[3] // 2] for x in features])
    for a, b in zip(padded.cls + padded.reg, cropped.cls + cropped.reg, strict=True):
        assert torch.allclose(a[1:, :, :, : b.shape[3]], b, atol=1e-5)
        assert not a[1, :, :, b.shape[3] :].any()


def test_the_fixed_head_is_the_dynamic_one_with_every_gate_open() -> None:
    torch.manual_seed(0)
    fixed = FixedHead(8, depth=2, norm_groups=2)
    dynamic = FineGrainedHead(8, depth=2, norm_groups=2, gating="none", scale_init=1.0)
    dynamic.load_state_dict({**dynamic.state_dict(), **fixed.state_dict()})
    for valid in (None, half_padded()):
        a, b = fixed(pyramid(), valid), dynamic(pyramid(), valid)
        for x, y in zip(a.cls + a.reg, b.cls + b.reg, strict=True):
            assert torch.allclose(x, y, atol=1e-5)


class Open(nn.Module):
    """Gates of 1 wherever there is something."""

    joint = False

    def forward(self, logits: Tensor, layout: RowLayout) -> Tensor:
        return torch.ones_like(logits)

    def logit(self, openness: float) -> float:
        return 0.0


def test_the_fixed_twin_has_the_weights_of_the_dynamic_head() -> None:
    torch.manual_seed(0)
    dynamic = FineGrainedHead(8, depth=2, norm_groups=2, activation=Open(), scale_init=1.0).train()
    for parameter in dynamic.parameters():
        if parameter.numel() > 1:
            nn.init.normal_(parameter, mean=0.1, std=0.3)
    drawn = torch.get_rng_state()
    twin = dynamic.fixed_twin()
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not twin.training and dynamic.training
    ours, theirs = dict(dynamic.named_parameters()), dict(twin.named_parameters())
    assert set(ours) - set(theirs) == {name for name in ours if ".gates." in name or name.endswith("scale_weight")}
    for name, parameter in theirs.items():
        assert torch.equal(parameter, ours[name]) and parameter is not ours[name]
    for valid in (None, half_padded()):
        a, b = twin(pyramid(), valid), dynamic.eval()(pyramid(), valid)
        for x, y in zip(a.cls + a.reg, b.cls + b.reg, strict=True):
            assert torch.allclose(x, y, atol=1e-4, rtol=1e-4)


def test_the_fixed_twin_is_of_the_same_kind() -> None:
    dynamic = FineGrainedHead(8, depth=1, norm_groups=4, norm_stats="published").double()
    twin = dynamic.to(memory_format=torch.channels_last).fixed_twin()  # type: ignore[call-overload]
    assert not twin.ignore_padding
    assert {parameter.dtype for parameter in twin.parameters()} == {torch.float64}
    weight = twin.cls[0].depth.conv1.weight  # type: ignore[union-attr]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert twin.reg[0].up.norm.num_groups == 4  # type: ignore[union-attr]
