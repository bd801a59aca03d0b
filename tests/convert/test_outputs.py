"""Converted weights compute what the source's layers compute with theirs, also after saving and loading."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from released_layouts import RELEASES, Shapes, marked, random_weights
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from dyndet import load_detector
from dyndet.cli.compose import build, compose_command
from dyndet.convert import Converted, read_release, save_release
from dyndet.convert.tensor_transforms import background_first, linear_of_1x1, merged_by_position
from dyndet.models.detectors.dense import DenseDetector
from dyndet.models.heads.attention import TaskAttention
from dyndet.models.predictors.anchor_based import AnchorPredictor
from dyndet.predict import predict
from dyndet.structures import ImageBatch


def converted_release(folder: Path, name: str, values: Callable[[Shapes], dict[str, Tensor]]) -> Converted:
    release = RELEASES[name]
    file = folder / "release.pth"
    torch.save({release.container: values(release.shapes), "meta": release.meta}, file)
    return read_release(file)


def detector_of(converted: Converted) -> DenseDetector:
    with torch.device("meta"):
        detector = build(converted.config.detector)
    detector.load_state_dict(converted.state_dict, strict=True, assign=True)
    detector.preprocess = build(converted.config.preprocess)  # its mean and std are no weights
    nn.Module.to(detector, memory_format=torch.channels_last)  # as `load_detector` has it
    return detector.eval()


def flat(raw: list[dict[str, Tensor]]) -> Tensor:
    return torch.cat([value.detach().flatten() for level in raw for value in level.values()])


@pytest.mark.parametrize("height, width", [(6, 8), (5, 7)])
def test_patch_merging(height: int, width: int) -> None:
    """mmdetection's: unfolded 2x2 patches with the channel slowest, layer norm, linear."""
    generator = torch.Generator().manual_seed(0)
    channels = 3
    maps, gain, shift = (torch.randn(*shape, generator=generator) for shape in ((2, height, width, 3), (12,), (12,)))
    weight = torch.randn(6, 12, generator=generator)
    padded = F.pad(maps.permute(0, 3, 1, 2), (0, width % 2, 0, height % 2))
    patches = F.unfold(padded, 2, stride=2).transpose(1, 2)
    theirs = F.layer_norm(patches, (12,), gain, shift) @ weight.T

    ours = PatchMerging(channels)
    ours.load_state_dict({
        "norm.weight": merged_by_position(gain),
        "norm.bias": merged_by_position(shift),
        "reduction.weight": merged_by_position(weight),
    })  # fmt: skip
    torch.testing.assert_close(ours(maps).flatten(1, 2), theirs)


def test_task_attention() -> None:
    """DyReLU of 1x1 convolutions (mmdetection) with the order a1, b1, a2, b2 of coefficients."""
    generator = torch.Generator().manual_seed(0)
    channels = 8
    squeeze, excite = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, 4 * channels, 1)
    for layer in (squeeze, excite):
        nn.init.normal_(layer.weight, generator=generator)
    maps = torch.randn(2, channels, 5, 7, generator=generator)
    pooled = F.adaptive_avg_pool2d(maps, 1)
    t = ((excite(squeeze(pooled).relu()) + 3) / 6).clamp(0, 1) - 0.5
    a1, b1, a2, b2 = (t[:, part * channels : (part + 1) * channels] for part in range(4))
    theirs = torch.maximum((2 * a1 + 1) * maps + b1, 2 * a2 * maps + b2)

    ours = TaskAttention(channels)
    ours.load_state_dict({
        "squeeze.weight": linear_of_1x1(squeeze.weight),
        "squeeze.bias": squeeze.bias,
        "excite.weight": linear_of_1x1(excite.weight),
        "excite.bias": excite.bias,
    })  # fmt: skip
    torch.testing.assert_close(ours(maps, None), theirs)


def test_background_moves_to_the_front() -> None:
    weight, bias, x = torch.randn(5, 3), torch.randn(5), torch.randn(4, 3)
    theirs = F.linear(x, weight, bias).softmax(1)  # classes, then background
    ours = F.linear(x, background_first(weight), background_first(bias)).softmax(1)
    torch.testing.assert_close(ours[:, 1:], theirs[:, :-1])
    torch.testing.assert_close(ours[:, 0], theirs[:, -1])


def test_masks_are_what_the_source_makes_of_a_region(tmp_path: Path) -> None:
    """Convolutions with ReLU, a transposed one with ReLU, and one logit per class; only these weights are random."""
    shapes = RELEASES["mmdet mask_rcnn_r50"].shapes
    theirs = random_weights({name: shape for name, shape in shapes.items() if ".mask_head." in name})
    file = tmp_path / "release.pth"
    torch.save({"state_dict": {**marked(shapes), **theirs}}, file)
    converted = read_release(file)
    with torch.device("meta"):
        detector = build(converted.config.detector)
    detector.load_state_dict(converted.state_dict, strict=True, assign=True)
    regions = torch.randn(2, 256, 14, 14, generator=torch.Generator().manual_seed(1))

    def layer(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return theirs[f"roi_head.mask_head.{name}.weight"], theirs[f"roi_head.mask_head.{name}.bias"]

    expected = regions
    for index in range(4):
        expected = F.conv2d(expected, *layer(f"convs.{index}.conv"), padding=1).relu()
    expected = F.conv2d(F.conv_transpose2d(expected, *layer("upsample"), stride=2).relu(), *layer("conv_logits"))
    with torch.no_grad():
        torch.testing.assert_close(detector.predictor.mask_head(regions), expected)
    assert expected.std() > 1e-2


SIZES = [2 ** (octave / 3) for octave in range(3)]
RATIOS = [0.5, 1.0, 2.0]  # height / width
ORDERS = {
    # mmdetection: all scales of a ratio, then the next ratio; detectron2: all ratios of a size, then the next size.
    "mmdet retinanet_r50": [(size, ratio) for ratio in RATIOS for size in SIZES],
    "mmdet freeanchor_r50": [(size, ratio) for ratio in RATIOS for size in SIZES],
    "authors dyhead retinanet": [(size, ratio) for size in SIZES for ratio in RATIOS],
}


@pytest.mark.parametrize("name", ORDERS)
def test_anchor_order(name: str, tmp_path: Path) -> None:
    """The channels of anchor a mean the shape that the source gives its anchor a."""
    converted = converted_release(tmp_path, name, marked)
    predictor = build(converted.config.predictor, channels=256, strides=[8])
    assert isinstance(predictor, AnchorPredictor)
    for anchor, (size, ratio) in enumerate(ORDERS[name]):
        cls, box = torch.full((1, 720, 1, 1), -9.0), torch.zeros(1, 36, 1, 1)
        cls[0, 80 * anchor + 17] = 9.0
        level = {"cls": cls, "box": box}
        (anchors,) = predictor.level_anchors([level])
        scores = level["cls"].permute(0, 2, 3, 1).reshape(-1, 80)
        (best,) = scores[:, 17].topk(1).indices
        width, height = (anchors[best, 2:] - anchors[best, :2]).tolist()
        assert width == pytest.approx(32 * size / math.sqrt(ratio), rel=1e-5)
        assert height == pytest.approx(32 * size * math.sqrt(ratio), rel=1e-5)


def test_first_convolution_is_not_flipped(tmp_path: Path) -> None:
    """Blue first: the pixels are turned, not the weights."""
    converted = converted_release(tmp_path, "fcos", random_weights)
    theirs = random_weights(RELEASES["fcos"].shapes)["backbone.bottom_up.stem.conv1.weight"]
    assert torch.equal(converted.state_dict["backbone.body.conv1.weight"], theirs)
    preprocess = build(converted.config.preprocess)
    network_input = preprocess(ImageBatch.of([torch.full((3, 32, 32), 255, dtype=torch.uint8)]))
    expected = 255 - torch.tensor([103.53, 116.28, 123.675])
    torch.testing.assert_close(network_input[0, :, 0, 0], expected)


@pytest.mark.parametrize("name", ["fcos dynamic D4", "authors dyhead retinanet"])
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    converted = converted_release(tmp_path, name, random_weights)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = flat(detector_of(converted).raw_outputs(image))
        assert before.isfinite().all() and before.std() > 1e-3
        detector = load_detector(save_release(converted, tmp_path / "converted.ckpt"))
        loaded = flat(detector.raw_outputs(image))
        assert torch.equal(loaded, before)
        again = replace(converted, state_dict=detector.state_dict())
        twice = flat(load_detector(save_release(again, tmp_path / "again.ckpt")).raw_outputs(image))
    assert torch.equal(twice, loaded)


def test_predict_takes_it(tmp_path: Path) -> None:
    converted = converted_release(tmp_path, "mmdet fcos improved", random_weights)
    converted.config.data.val_short_edge = 64
    file = save_release(converted, tmp_path / "out" / "converted.ckpt")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8)).save(tmp_path / "image.png")
    arguments = [f"ckpt={file}", f"source={tmp_path / 'image.png'}", f"out={tmp_path / 'found'}", "device=cpu"]
    folder = predict(compose_command("predict", arguments))
    assert (folder / "detections.json").is_file()
