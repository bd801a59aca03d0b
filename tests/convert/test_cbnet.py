"""CBNetV2's Faster R-CNN: every tensor arrives, and both backbones compute what the paper's equation says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from released_layouts import CLASSES, Shapes, conv, marked, norm, openmmlab_fpn, openmmlab_resnet, openmmlab_two_stage
from torch import Tensor, nn
from torchvision.models import resnet50

from dyndet.cli.compose import build, compose_experiment
from dyndet.convert import Converted, read_release, save_release
from dyndet.errors import UserError
from dyndet.lightning.step2 import load_detectors
from dyndet.models.detectors.dynamic import DynamicDetector
from dyndet.structures import ImageBatch

WIDTHS = (64, 256, 512, 1024, 2048)


def layout(removed: int) -> Shapes:
    """Of a release whose second backbone lacks so many stages behind the stem; its norm of the stem stays."""
    body = dict(openmmlab_resnet())
    names = {f"backbone.cb_modules.0.{name.removeprefix('backbone.')}": shape for name, shape in body.items()}
    gone = ("conv1.", *(f"layer{stage}." for stage in range(1, removed + 1)))
    for name, shape in body.items():
        part = name.removeprefix("backbone.")
        if not part.startswith(gone):
            names[f"backbone.cb_modules.1.{part}"] = shape
    for i in range(removed, 4):
        for j in range(4 - i):
            names |= dict(conv(f"backbone.cb_linears.{i}.{j}.0", WIDTHS[i], WIDTHS[i + j + 1], 1, bias=False))
            names |= dict(norm(f"backbone.cb_linears.{i}.{j}.1", WIDTHS[i], counter=True))
    return names | dict(openmmlab_fpn("neck", WIDTHS[1:], ())) | dict(openmmlab_two_stage(CLASSES))


def converted(folder: Path, weights: dict[str, Tensor]) -> Converted:
    torch.save({"state_dict": weights, "meta": {}}, folder / "release.pth")
    return read_release(folder / "release.pth")


def detector_of(release: Converted) -> DynamicDetector:
    detector = build(release.config.detector)
    assert isinstance(detector, DynamicDetector)
    detector.load_state_dict(release.state_dict, strict=True)
    return detector.eval()


@pytest.mark.parametrize("removed", [0, 1])
def test_every_tensor_arrives(removed: int, tmp_path: Path) -> None:
    shapes = layout(removed)
    release = converted(tmp_path, marked(shapes))
    assert release.experiment == "dy_faster_rcnn_r50" and release.source == "CBNetV2" and "step 2" in release.note
    report = release.report
    assert {*report.used, *report.unused} == set(shapes)
    assert all("cb_modules.1.bn1." in name for name in report.unused)
    numbers = {name: float(number) for number, name in enumerate(shapes, 1)}
    ours = {target: numbers[name] for name, target in report.used.items()}
    ours |= {
        name.replace("first.", "second.", 1): value
        for name, value in ours.items()
        if name.startswith("first.") and not name.startswith("first.backbone.")
    }
    for name, value in release.state_dict.items():
        assert name in report.filled or {value.min().item(), value.max().item()} == {ours[name]}, name
    detector = detector_of(release)
    assert detector.first.neck is detector.second.neck
    deepest = f"links.sources.{3 - removed}.links.{2 - removed}.0.weight"  # c5 to the entrance of c4
    assert report.used["backbone.cb_linears.2.1.0.weight"] == deepest


@pytest.mark.parametrize("removed", [0, 1])
@torch.no_grad()
def test_the_backbones_compute_the_published_sum(removed: int, tmp_path: Path) -> None:
    """Stage i of the second backbone reads sum over j >= i of up(link_ij(c_j)) beside its own input."""
    generator = torch.Generator().manual_seed(removed)
    weights = {}
    for name, shape in layout(removed).items():
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.zeros((), dtype=torch.int64)
        elif name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
            weights[name] = 0.5 + torch.rand(shape, generator=generator)
        else:
            spread = (2 / max(1, torch.tensor(shape[1:]).prod().item())) ** 0.5 if len(shape) > 1 else 0.1
            weights[name] = spread * torch.randn(shape, generator=generator)
    images = torch.rand(1, 3, 64, 96, generator=generator)
    detector = detector_of(converted(tmp_path, weights))
    batch = ImageBatch.of(images)

    def part(prefix: str) -> nn.Module:
        body = resnet50(num_classes=1).eval()
        start = f"backbone.{prefix}."
        theirs = {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}
        body.load_state_dict(theirs, strict=False)
        return body

    first, second = part("cb_modules.0"), part("cb_modules.1")
    x = first.maxpool(F.relu(first.bn1(first.conv1(detector.preprocess(batch)))))  # type: ignore[operator]
    maps = [x]
    for stage in range(1, 5):
        maps.append(getattr(first, f"layer{stage}")(maps[-1]))
    x = maps[removed]
    expected = maps[1 : removed + 1]
    for i in range(removed, 4):
        total = x
        for j in range(4 - i):
            name = f"backbone.cb_linears.{i}.{j}"
            added = F.conv2d(maps[i + j + 1], weights[f"{name}.0.weight"])
            keys = ("running_mean", "running_var", "weight", "bias")
            added = F.batch_norm(added, *(weights[f"{name}.1.{key}"] for key in keys))
            total = total + F.interpolate(added, size=x.shape[-2:])
        x = getattr(second, f"layer{i + 1}")(total)
        expected.append(x)
    seen = detector.look(batch)
    for ours, theirs in zip(detector._easy_maps(seen), maps[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
    for ours, theirs in zip(detector._hard_maps(seen), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def test_step_2_starts_from_a_release(tmp_path: Path) -> None:
    release = converted(tmp_path, marked(layout(0)))
    init = save_release(release, tmp_path / "converted.ckpt")
    config = compose_experiment(
        release.experiment, ["+router=exact", f"init={init}", "backbone.weights=none", *release.overrides]
    )
    detector = build(config.detector)
    data: Any = SimpleNamespace(categories=release.categories)
    load_detectors(detector, str(init), data)
    assert detector.router is not None
    assert torch.equal(detector.second.neck.output[0].weight, release.state_dict["first.neck.output.0.weight"])


def test_other_releases_are_refused_by_name(tmp_path: Path) -> None:
    weights = marked(layout(0))
    swin = {name.replace("layer", "layers."): value for name, value in weights.items()}
    with pytest.raises(UserError, match="Faster R-CNN on two ResNets"):
        converted(tmp_path, swin)
