"""DyHead: its parts against plain loops in float64, its conventions, its ablations."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from dyndet.models.heads.attention import ScaleAttention, TaskAttention
from dyndet.models.heads.chain import HeadChain
from dyndet.models.heads.dyhead import DyHead, DyHeadBlock, HighOffset
from dyndet.models.heads.plain import PlainHead
from dyndet.ops.deform_conv import modulated_deform_conv
from dyndet.ops.flops import mac_counter

C = 8
MODES: list[HighOffset] = ["prefix", "resize", "upsample_first"]


def pyramid(sizes: list[tuple[int, int]], batch: int = 2, channels: int = C, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64) for size in sizes]


def halving(height: int, width: int, levels: int) -> list[tuple[int, int]]:
    sizes = [(height, width)]
    for _ in range(levels - 1):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return sizes


def head(**kwargs: object) -> DyHead:
    """Random everywhere, so that nothing hides behind a zero start."""
    torch.manual_seed(1)
    module = DyHead(C, **{"num_blocks": 1, "gn_groups": 4, **kwargs}).double()  # type: ignore[arg-type]
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def tap(x: Tensor, y: float, z: float) -> Tensor:
    """Bilinear sample (C,) of (C, H, W) at row y, column z; zero outside."""
    height, width = x.shape[1:]
    if y <= -1 or z <= -1 or y >= height or z >= width:
        return x.new_zeros(len(x))
    top, left = int(y // 1), int(z // 1)
    total = x.new_zeros(len(x))
    for i, wy in ((top, 1 - (y - top)), (top + 1, y - top)):
        for j, wz in ((left, 1 - (z - left)), (left + 1, z - left)):
            if 0 <= i < height and 0 <= j < width:
                total = total + wy * wz * x[:, i, j]
    return total


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_deformable_convolution_against_a_loop(stride: int, groups: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 5, 7, dtype=torch.float64)
    height, width = -(-5 // stride), -(-7 // stride)
    offset = torch.randn(1, 18, height, width, dtype=torch.float64) * 2
    mask = torch.rand(1, 9, height, width, dtype=torch.float64)
    weight, bias = torch.randn(6, 4 // groups, 3, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    expected = torch.zeros(1, 6, height, width, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            total = bias.clone()
            for k in range(9):
                dy, dx = offset[0, 2 * k, i, j].item(), offset[0, 2 * k + 1, i, j].item()
                sample = mask[0, k, i, j] * tap(x[0], i * stride - 1 + k // 3 + dy, j * stride - 1 + k % 3 + dx)
                for out in range(6):
                    group = out // (6 // groups)
                    part = sample[group * 4 // groups : (group + 1) * 4 // groups]
                    total[out] += (weight[out, :, k // 3, k % 3] * part).sum()
            expected[0, :, i, j] = total
    actual = modulated_deform_conv(x, offset, mask, weight, bias, stride=stride)
    assert torch.allclose(actual, expected, atol=1e-10)


def test_deformable_convolution_under_autocast() -> None:
    x = torch.randn(1, 4, 5, 5)
    offset, mask = torch.zeros(1, 18, 5, 5), torch.ones(1, 9, 5, 5)
    weight = torch.randn(4, 4, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = modulated_deform_conv(x.bfloat16(), offset.bfloat16(), mask.bfloat16(), weight)
    assert outputs.dtype == torch.float32
    assert torch.allclose(outputs, F.conv2d(x.bfloat16().float(), weight, padding=1), atol=1e-5)


def reference_block(block: DyHeadBlock, features: list[Tensor], mode: str) -> list[Tensor]:
    """Section by section as specified, for one block without padding."""
    outputs = []
    assert block.offset is not None and block.scale is not None and block.task is not None
    for level, x in enumerate(features):
        predicted = block.offset(x)
        offset, mask = predicted[:, :18], torch.sigmoid(predicted[:, 18:])

        def normal(conv: nn.Module, x: Tensor, offset: Tensor, mask: Tensor, stride: int = 1) -> Tensor:
            y = deform_conv2d(x, offset, conv.weight, conv.bias, stride=stride, padding=1, mask=mask)  # type: ignore[arg-type]
            return F.group_norm(y, conv.norm.num_groups, conv.norm.weight, conv.norm.bias)  # type: ignore[union-attr,arg-type]

        maps = [normal(block.mid, x, offset, mask)]
        if level > 0:
            maps.append(normal(block.low, features[level - 1], offset, mask, 2))
        if level < len(features) - 1:
            coarse = features[level + 1]
            height, width = coarse.shape[2:]
            if mode == "upsample_first":
                large = F.interpolate(coarse, size=x.shape[2:], mode="bilinear", align_corners=True)
                maps.append(normal(block.high, large, offset, mask))
            else:
                if mode == "prefix":
                    there = torch.stack([o.flatten()[: 18 * height * width].view(18, height, width) for o in offset])
                    much = torch.stack([m.flatten()[: 9 * height * width].view(9, height, width) for m in mask])
                else:
                    there = F.interpolate(offset, size=(height, width), mode="bilinear", align_corners=True) / 2
                    much = F.interpolate(mask, size=(height, width), mode="bilinear", align_corners=True)
                small = normal(block.high, coarse, there, much)
                maps.append(F.interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=True))
        total = torch.zeros_like(maps[0])
        for y in maps:
            mean = y.mean((2, 3), keepdim=True)
            s = ((F.relu(block.scale.conv(mean)) + 3) / 6).clamp(0, 1)
            assert (s >= 0.5).all()
            total = total + s * y
        y = total / len(maps)
        hidden = F.relu(block.task.squeeze(y.mean((2, 3))))
        t = ((block.task.excite(hidden) + 3) / 6).clamp(0, 1) - 0.5
        a1, b1, a2, b2 = (t[:, i * C : (i + 1) * C, None, None] for i in range(4))
        outputs.append(torch.maximum((1 + 2 * a1) * y + b1, 2 * a2 * y + b2))
    return outputs


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(MODES), st.integers(1, 13), st.integers(1, 13), st.integers(2, 6), st.booleans(), st.integers(1, 3)
)
def test_blocks_against_the_specification(
    mode: str, height: int, width: int, levels: int, dcn_bias: bool, batch: int
) -> None:
    features = pyramid(halving(height, width, levels), batch)
    module = head(high_offset=mode, dcn_bias=dcn_bias, num_blocks=2)
    expected = features
    for block in module.blocks:
        expected = reference_block(block, expected, mode)  # type: ignore[arg-type]
    output = module(features)
    assert output.cls is output.reg and output.routing is None
    for have, want in zip(output.cls, expected, strict=True):
        assert torch.allclose(have, want, atol=1e-8)


def test_the_ways_to_sample_the_coarser_level_differ_and_agree_at_a_zero_start() -> None:
    features = pyramid([(8, 12), (4, 6), (2, 3)])
    results = {mode: head(high_offset=mode)(features).cls[0] for mode in MODES}
    assert not torch.allclose(results["prefix"], results["resize"], atol=1e-2)
    assert not torch.allclose(results["resize"], results["upsample_first"], atol=1e-2)
    torch.manual_seed(0)
    start = {mode: DyHead(C, num_blocks=1, gn_groups=4, high_offset=mode).double() for mode in MODES}
    for module in start.values():
        module.load_state_dict(start["prefix"].state_dict())
    results = {mode: module(features).cls[0] for mode, module in start.items()}
    assert torch.allclose(results["prefix"], results["resize"])
    assert not torch.allclose(results["prefix"], results["upsample_first"], atol=1e-3)


def test_the_unread_tail_of_the_offsets_gets_no_gradient_from_the_coarser_level() -> None:
    """The prefix of an 8 x 8 buffer for a 4 x 4 level: a quarter of the values, the first 4.5 of 18 channels."""
    module = head(high_offset="prefix")
    block = module.blocks[0]
    assert isinstance(block, DyHeadBlock)
    offset = torch.randn(1, 18, 8, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(1, 9, 8, 8, dtype=torch.float64)
    sampling = block._sampling_above((offset, mask), (4, 4))
    assert sampling is not None
    block.high(pyramid([(4, 4)], 1)[0], sampling).sum().backward()
    assert offset.grad is not None
    flat = offset.grad.flatten()
    assert (flat[: 18 * 16] != 0).any() and (flat[18 * 16 :] == 0).all()


def test_task_attention_starts_as_relu() -> None:
    task = TaskAttention(C).double()
    nn.init.zeros_(task.squeeze.weight)
    nn.init.zeros_(task.excite.weight)
    x = pyramid([(3, 4)])[0]
    assert torch.equal(task(x, None), x.relu())


def test_a_level_can_never_be_switched_off() -> None:
    scale = ScaleAttention(C).double()
    nn.init.constant_(scale.conv.bias, -50.0)  # type: ignore[arg-type]
    assert (scale(pyramid([(3, 4)])[0], None) == 0.5).all()
    nn.init.constant_(scale.conv.bias, 50.0)  # type: ignore[arg-type]
    assert (scale(pyramid([(3, 4)])[0], None) == 1).all()


@pytest.mark.parametrize("channels", [64, 256])
@pytest.mark.parametrize("bias", [False, True])
def test_parameters_of_a_block(channels: int, bias: bool) -> None:
    with torch.device("meta"):
        module = DyHead(channels, num_blocks=1, dcn_bias=bias)
    c = channels
    formula = (243 * c + 27) + 27 * c**2 + 3 * c * bias + 6 * c + (c + 1) + (1.25 * c**2 + 4.25 * c)
    assert sum(p.numel() for p in module.parameters()) == formula
    if channels == 256:
        assert formula == (1_917_276 if bias else 1_916_508)


@pytest.mark.parametrize(("mode", "gmacs"), [("prefix", 127.272), ("resize", 127.272), ("upsample_first", 186.454)])
def test_multiply_adds(mode: str, gmacs: float) -> None:
    sizes = halving(100, 168, 5)
    with torch.device("meta"):
        module, features = DyHead(256, high_offset=mode), [torch.empty(1, 256, *size) for size in sizes]  # type: ignore[arg-type]
    with torch.no_grad(), mac_counter() as counter:
        module(features)
    macs = counter.get_total_flops() / 2
    assert macs / 1e9 == pytest.approx(gmacs, abs=6e-4)
    if mode == "prefix":
        area = [h * w for h, w in sizes]
        own = sum(62_208 * a + 589_824 * a + 81_920 for a in area)
        neighbours = 589_824 * (sum(area[1:]) + sum(area[1:]))
        scale = 256 * (2 + 3 * (len(area) - 2) + 2)
        assert macs == 6 * (own + neighbours + scale)


def test_starting_values() -> None:
    torch.manual_seed(0)
    zero, normal, default = (
        DyHead(256, num_blocks=1, zero_init_offset=zero, init=init).blocks[0]  # type: ignore[arg-type]
        for zero, init in ((True, "normal"), (False, "normal"), (False, "default"))
    )
    for block, std in ((zero, 0.0), (normal, 0.01), (default, 0.0120)):
        assert block.offset.weight.std().item() == pytest.approx(std, rel=0.03)  # type: ignore[union-attr]
        assert block.mid.weight.std().item() == pytest.approx(0.0120, rel=0.03)  # type: ignore[union-attr]
        assert block.scale.conv.weight.std().item() == pytest.approx(0.01, rel=0.2)  # type: ignore[union-attr]
    assert (default.offset.bias != 0).all() and (normal.offset.bias == 0).all()  # type: ignore[union-attr]
    stds = [block.task.squeeze.weight.std().item() for block in (zero, default)]  # type: ignore[union-attr]
    assert stds == [pytest.approx(0.01, rel=0.05), pytest.approx(0.036, rel=0.05)]
    assert default.task.excite.weight.std().item() == pytest.approx(0.072, rel=0.05)  # type: ignore[union-attr]


def test_each_attention_can_be_switched_off() -> None:
    features = pyramid([(6, 8), (3, 4)])
    full = head()
    for name in ("spatial", "scale", "task"):
        module = head(**{name: False})
        assert sum(p.numel() for p in module.parameters()) < sum(p.numel() for p in full.parameters())
        assert [x.shape for x in module(features).cls] == [x.shape for x in features]
    module = head(spatial=False, scale=False, task=False)
    block = module.blocks[0]
    below = block.low.norm(F.conv2d(features[0], block.low.weight, stride=2, padding=1))  # type: ignore[union-attr,operator]
    own = block.mid.norm(F.conv2d(features[1], block.mid.weight, padding=1))  # type: ignore[union-attr,operator]
    assert torch.allclose(module(features).cls[1], F.relu((own + below) / 2))


def test_checkpointing_changes_memory_alone() -> None:
    features = [x.requires_grad_() for x in pyramid([(6, 8), (3, 4)])]
    gradients = []
    for checkpointing in (False, True):
        module = head(num_blocks=3, checkpointing=checkpointing)
        outputs = module(features).cls
        loss = torch.stack([x.square().sum() for x in outputs]).sum()
        gradients.append(torch.autograd.grad(loss, [*features, *module.parameters()]))
    assert all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True))


def test_all_parameters_train() -> None:
    module = head(num_blocks=2)
    for block in module.blocks:
        nn.init.constant_(block.scale.conv.bias, 2.0)  # type: ignore[union-attr]  # inside the ReLU
    sum(x.square().sum() for x in module(pyramid([(6, 8), (3, 4)])).cls).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_as_it_went_in(dtype: torch.dtype) -> None:
    module = head().float()
    features = [x.float() for x in pyramid([(6, 8), (3, 4)])]
    exact = module(features).cls
    with torch.autocast("cpu", dtype=dtype):
        mixed = module([x.to(dtype) for x in features]).cls
    assert all(x.dtype == dtype for x in mixed)
    assert all(torch.allclose(a, b.float(), atol=0.1, rtol=0.1) for a, b in zip(exact, mixed, strict=True))
    whole = module.to(dtype)([x.to(dtype) for x in features]).cls
    assert all(x.dtype == dtype and x.isfinite().all() for x in whole)


def test_padding_is_not_seen_where_nothing_is_upsampled() -> None:
    """On the coarsest level: its own map and the finer one."""
    module = head(num_blocks=1)
    small = pyramid([(6, 8), (3, 4)], 1)
    large, valid = [], []
    for x, (height, width) in zip(small, [(10, 12), (5, 6)], strict=True):
        canvas = torch.randn(1, C, height, width, dtype=torch.float64)
        canvas[:, :, : x.shape[2], : x.shape[3]] = x
        large.append(canvas)
        mask = torch.zeros(1, 1, height, width, dtype=torch.bool)
        mask[:, :, : x.shape[2], : x.shape[3]] = True
        valid.append(mask)
    seen, alone = module(large, valid).cls, module(small).cls
    assert torch.allclose(seen[1][:, :, :3, :4], alone[1])
    assert all((x * ~mask == 0).all() for x, mask in zip(seen, valid, strict=True))
    published = head(num_blocks=1, ignore_padding=False)(large, valid).cls
    assert not torch.allclose(published[1][:, :, :3, :4], alone[1], atol=1e-3)


def test_towers_follow_attention() -> None:
    torch.manual_seed(0)
    chain = HeadChain(
        C,
        attention=lambda channels: DyHead(channels, num_blocks=1, gn_groups=4),
        towers=lambda channels: PlainHead(channels, num_convs=1, norm_groups=4),
    )
    features = [x.float() for x in pyramid([(6, 8), (3, 4)])]
    expected = chain.towers(chain.attention(features).cls)
    have = chain(features)
    assert all(torch.equal(a, b) for a, b in zip(have.cls + have.reg, expected.cls + expected.reg, strict=True))


def test_levels_that_do_not_halve_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(6, 8\) is followed by \(2, 2\), not by \(3, 4\)"):
        head()(pyramid([(6, 8), (2, 2)]))
    with pytest.raises(ValueError, match="high_offset must be one of prefix, resize, upsample_first"):
        DyHead(C, high_offset="crop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gn_groups"):
        DyHead(20, gn_groups=16)


def test_it_compiles_without_graph_breaks() -> None:
    module = head(high_offset="prefix").float()
    features = [x.float() for x in pyramid([(6, 8), (3, 4)])]
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="eager")(features).cls
        expected = module(features).cls
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(compiled, expected, strict=True))
    assert list(pairwise([x.shape[-1] for x in expected])) == [(8, 4)]
