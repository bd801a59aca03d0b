"""DynamicDet's and YOLOv7's files: every tensor arrives, and the networks compute what theirs are described to."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from dynamicdet_forward import ReleasedNetwork
from dynamicdet_layouts import VARIANTS, cascade, plain, with_anchors
from omegaconf import OmegaConf
from released_layouts import RELEASES, marked
from torch import Tensor, nn

from dyndet import load_detector
from dyndet.cli.compose import build, compose_command
from dyndet.convert import Converted, __main__, dynamicdet, read_release, release, save_release
from dyndet.convert.engine import apply_rules
from dyndet.convert.recipe import FILLS, Recipe
from dyndet.convert.source import Source, read_source
from dyndet.errors import UserError
from dyndet.models.backbones.yolov7_blocks import scaled
from dyndet.models.detectors.dynamic import DynamicDetector

Shapes = dict[str, tuple[int, ...]]

FILES: dict[str, tuple[str, Shapes, int]] = {  # variant, tensors, parameters (3,005: X's implicit vectors)
    "dy_yolov7": ("yolov7", cascade(VARIANTS["yolov7"]), 80_621_333),
    "dy_yolov7x": ("yolov7x", cascade(VARIANTS["yolov7x"]), 151_093_149),
    "dy_yolov7w6": ("yolov7w6", cascade(VARIANTS["yolov7w6"]), 147_364_049),
    "dy_yolov7 step 1": ("yolov7", cascade(VARIANTS["yolov7"], routed=False), 78_546_292),
    "yolov7": ("yolov7", plain(VARIANTS["yolov7"], implicit=True), 37_622_682),
    "yolov7x deploy": ("yolov7x", plain(VARIANTS["yolov7x"], implicit=False), 71_347_394 - 3_005),
    "yolov7w6 deploy": ("yolov7w6", plain(VARIANTS["yolov7w6"], implicit=False), 70_426_236),
}


def weights_of(name: str) -> dict[str, Tensor]:
    """A number for every tensor, without memory for them; anchors as published."""
    variant, shapes, _ = FILES[name]
    return with_anchors(marked(shapes), VARIANTS[variant])


@cache
def converted(name: str) -> Converted:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "release.pt"
        torch.save({"epoch": -1, "model": weights_of(name), "optimizer": None}, path)
        return read_release(path)


WHERE = {
    "dy_yolov7": {
        "model_b.1.conv.weight": "first.backbone.enters.0.1.conv.weight",
        "model_b.24.conv.weight": "first.backbone.bodies.2.out.conv.weight",
        "model_b.40.bn.running_var": "first.backbone.enters.4.before.norm.running_var",
        "model_b2.4.conv.bias": "links.sources.4.conv.bias",
        "model_b2.8.bn.bias": "second.backbone.bodies.0.norm.bias",
        "model_b2.50.conv.weight": "second.backbone.enters.4.strided.conv.weight",
        "model_h.0.cv2.conv.weight": "first.neck.spp.bypass.conv.weight",
        "model_h.13.conv.weight": "first.neck.narrow.0.conv.weight",
        "model_h.28.conv.weight": "first.neck.down.0.strided.conv.weight",
        "model_h2.52.rbr_1x1.0.weight": "second.neck.outputs.1.point.weight",
        "model_h2.54.im.2.implicit": "second.predictor.convs.2.scale",
        "router.layer2.weight": "router.out.weight",
    },
    "dy_yolov7x": {
        "model_b.58.conv.weight": "first.backbone.bodies.4.out.conv.weight",
        "model_b2.66.bn.weight": "second.backbone.bodies.4.chain.5.norm.weight",
        "model_h2.61.conv.weight": "second.neck.outputs.2.conv.weight",
    },
    "dy_yolov7w6": {
        "model_b.1.conv.weight": "first.backbone.bodies.0.conv.weight",
        "model_b2.0.conv.weight": "links.sources.0.conv.weight",
        "model_b2.46.conv.weight": "second.backbone.enters.5.conv.weight",
        "model_h.27.conv.weight": "first.neck.laterals.0.conv.weight",
        "model_h.57.conv.weight": "first.neck.down.2.conv.weight",
        "model_h.71.m.3.bias": "first.predictor.convs.3.conv.bias",
    },
    "yolov7": {
        "model.51.cv7.conv.weight": "neck.spp.out.conv.weight",
        "model.105.ia.0.implicit": "predictor.convs.0.add",
    },
    "yolov7x deploy": {"model.121.m.1.weight": "predictor.convs.1.weight"},
    "yolov7w6 deploy": {"model.118.m.3.weight": "predictor.convs.3.weight"},
}


@pytest.mark.parametrize("name", FILES)
def test_every_tensor_arrives(name: str) -> None:
    variant, shapes, parameters = FILES[name]
    buffers = ("running_", "num_batches_tracked", "anchor")
    assert sum(prod(shape) for key, shape in shapes.items() if not any(part in key for part in buffers)) == parameters
    result, report = converted(name), converted(name).report
    assert result.experiment == name.split()[0]
    assert {*report.used, *report.unused} == set(shapes) and not report.filled
    assert all(theirs.endswith(".anchors") for theirs in report.unused)
    assert WHERE.get(name, {}).items() <= report.used.items()
    # A number for every tensor: each of ours is the one of theirs that the report says, and no two are the same.
    numbers = {theirs: float(number) for number, theirs in enumerate(shapes, 1)}
    came = {ours: theirs for theirs, ours in report.used.items()}
    assert came.keys() == result.state_dict.keys() and len(came) == len(report.used)
    pixels = torch.tensor(VARIANTS[variant].anchors, dtype=torch.float32).unflatten(1, (3, 2))
    for ours, value in result.state_dict.items():
        if ours.endswith("anchors"):
            assert torch.equal(value, pixels)
        else:
            assert value[(0,) * value.dim()] == numbers[came[ours]], ours


def test_configurations() -> None:
    def settings(name: str) -> list[object]:
        keys = ("detector.first_link", "detector.cross", "preprocess.pad_multiple")
        return [OmegaConf.select(converted(name).config, key) for key in keys]

    assert settings("dy_yolov7") == [0, None, 32] and settings("dy_yolov7w6") == [1, None, 64]
    assert settings("dy_yolov7x") == [0, 2, 32]
    assert converted("dy_yolov7").overrides == ["+router=exact"]
    assert converted("dy_yolov7 step 1").overrides == []
    assert converted("dy_yolov7 step 1").config.detector.router is None
    assert converted("yolov7x deploy").overrides == ["predictor.implicit=false"]
    for name in FILES:
        pixels = converted(name).config.preprocess
        assert list(pixels.mean) == [0, 0, 0] and list(pixels.std) == [1, 1, 1] and not pixels.bgr
        assert pixels.centred and round(255 * pixels.fill, 6) == 114
        assert len(converted(name).categories) == 80


WIDTH = 0.125


def values(shapes: Shapes, variant: str) -> dict[str, Tensor]:
    """Half precision, as released, with activations in range."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(7)
            continue
        if name.endswith(("running_var", "bn.weight", "1.weight")) and len(shape) == 1:
            value = 1 + 0.3 * value.abs()
        elif name.endswith("implicit"):
            value = value + 1
        elif len(shape) == 4:
            value /= value[0].numel() ** 0.5
        weights[name] = value.half()
    return with_anchors(weights, VARIANTS[variant])


@cache
def small(model: str) -> tuple[dict[str, Tensor], Converted]:
    """A narrow cascade by the converter's rules, and the file it comes from."""
    shapes = cascade(VARIANTS[model], narrow=lambda channels: scaled(channels, WIDTH))
    weights = values(shapes, model)
    whole = converted(f"dy_{model}")
    config = deepcopy(whole.config)
    config.backbone.width = config.neck.width = WIDTH
    with torch.device("meta"):
        expected = build(config.detector).state_dict()
    rules = dynamicdet.recipe(Source(Path("small.pt"), weights, {})).rules
    state, report = apply_rules(weights, rules, expected, fills=FILLS)
    return weights, replace(whole, config=config, state_dict=state, report=report)


def loaded(model: str) -> DynamicDetector:
    result = small(model)[1]
    detector = build(result.config.detector)
    detector.load_state_dict(result.state_dict, strict=True)
    assert isinstance(detector, DynamicDetector)
    return detector.double().eval()


def image(model: str) -> Tensor:
    """So wide that the pools of an SPPCSPC differ."""
    width = 15 * (64 if model == "yolov7w6" else 32)
    return torch.rand(1, 3, 64, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model", VARIANTS)
@torch.no_grad()
def test_networks_compute_the_same(model: str) -> None:
    weights, result = small(model)
    assert {value.dtype for value in result.state_dict.values()} == {torch.float32, torch.int64}
    detector, network = loaded(model), ReleasedNetwork(weights, VARIANTS[model], cross=model == "yolov7x")
    seen = detector.look(image(model))
    pixels = seen.pixels.double()
    first = network.backbone("model_b", pixels)
    second = network.head("model_h2", network.backbone("model_b2", pixels, first))
    for route, theirs in (("first", network.head("model_h", first)), ("second", second)):
        ours = detector.raw_outputs(image(model), route)  # type: ignore[arg-type]
        for level, expected in zip(ours, theirs, strict=True):
            assert expected.std() > 0.01
            torch.testing.assert_close(level["pred"], expected, rtol=1e-9, atol=1e-9)
    easiness = torch.sigmoid(-detector.difficulty(detector.pooled(seen)))
    torch.testing.assert_close(easiness, network.easiness(first), rtol=0, atol=1e-6)  # pooled in single precision
    if network.cross:  # without it the outputs are others
        detector.cross = None
        straight = detector.raw_outputs(image(model))
        assert max(float((x["pred"] - y).abs().max()) for x, y in zip(straight, second, strict=True)) > 0.1


@torch.no_grad()
def test_saved_and_loaded(tmp_path: Path) -> None:
    result = small("yolov7w6")[1]
    detector = load_detector(save_release(result, tmp_path / "converted.ckpt"))
    assert isinstance(detector, DynamicDetector) and detector.router is not None
    again = detector.state_dict()
    assert again.keys() == result.state_dict.keys()
    assert all(torch.equal(again[name], value) for name, value in result.state_dict.items())


def test_both_heads_get_the_anchors_that_they_were_trained_with() -> None:
    """On other data, the published search changes those of the second head alone, and the loss of both uses them."""
    weights, result = small("yolov7")
    changed = {name: weights[f"model_h2.54.{name}"] * 1.5 for name in ("anchors", "anchor_grid")}
    weights = weights | {f"model_h2.54.{name}": value for name, value in changed.items()}
    recipe = dynamicdet.recipe(Source(Path("small.pt"), weights, {}))
    assert any("the first gets those of the second" in remark for remark in recipe.remarks)
    state, _ = apply_rules(weights, recipe.rules, result.state_dict, fills=FILLS)
    for part in ("first", "second"):
        assert torch.equal(state[f"{part}.predictor.anchors"].flatten(), changed["anchor_grid"].float().flatten())


def test_what_may_be_done_with_them_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(__main__, "read_release", lambda *_, **__: converted("dy_yolov7"))
    monkeypatch.setattr(__main__, "save_release", lambda _, out: Path(out))
    __main__.convert(compose_command("convert", ["source=dy.pt", f"out={tmp_path / 'converted.ckpt'}"]))
    printed = capsys.readouterr().out
    assert "as experiment dy_yolov7" in printed and "with +router=exact" in printed
    assert printed.count("academic use") == 1 and "GPL-3.0" in converted("yolov7").note


def test_wrong_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(weights: dict[str, Tensor], *parts: str, experiment: str = "auto") -> None:
        monkeypatch.setattr(release, "read_source", lambda path, **_: Source(path, weights, {}))
        with pytest.raises(UserError) as error:
            read_release(Path("release.pt"), experiment)
        message = str(error.value)
        assert message.startswith("release.pt") and "\n" not in message
        for part in parts:
            assert part in message

    whole = weights_of("dy_yolov7")
    refused({name: value for name, value in whole.items() if not name.startswith("model_h2")}, "is it whole?")
    other = {name.replace("model_h2.54", "model_h2.60"): value for name, value in whole.items()}
    refused(other, "no detector of DynamicDet", "model_h2.60", "54, 62, 71")
    refused({name.replace(".bn.", ".conv."): value for name, value in whole.items()}, "norms folded")
    refused({name: value for name, value in whole.items() if name != "model_h2.54.anchors"}, "lacks", "54.anchors")
    refused(whole | {"model_h2.54.anchors": torch.ones(3, 3, 2)}, "two sets of anchors")
    refused(whole, "is a release of dy_yolov7, not of yolov7", experiment="yolov7")
    odd = {name: value for name, value in whole.items() if not name.startswith("model_b2.4.")}
    refused(odd | {"model_b2.61.conv.weight": torch.ones(1)}, "2 missing", "1 left over: model_b2.61")

    refused(marked(RELEASES["mmdet atss_r50"].shapes), "not of yolov7: that has no", experiment="yolov7")

    alone = weights_of("yolov7w6 deploy")
    training = {name.replace("model.118.", "model.122."): value for name, value in alone.items()}
    refused(training, "without auxiliary heads", "model.122", "105, 121, 118")


def test_a_key_without_a_value_can_be_set() -> None:
    config = OmegaConf.create({"name": "own", "data": {"num_classes": 80}, "detector": {"cross": None}})
    wanted = Recipe("dy_yolov7x", [], 80, {"detector.cross": 2})
    assert release._adapt(config, wanted, Path("release.pt")) == ["detector.cross=2"]
    assert config.detector.cross == 2


class Wrapped(nn.Module):
    """As YOLOv7's own files hold their networks."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 4, 1))


def test_a_pickled_network_where_it_is_trusted(tmp_path: Path) -> None:
    path = tmp_path / "yolov7.pt"
    torch.save({"model": Wrapped().half()}, path)
    with pytest.raises(UserError, match="trust=true"):
        read_source(path)
    assert set(read_source(path, trust=True).weights) == {"model.0.weight", "model.0.bias"}


@pytest.mark.parametrize("averaged", [True, False])
def test_averaged_weights_come_before_those_of_the_last_step(averaged: bool, tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1)}, "ema": {"a": torch.ones(1)} if averaged else None}, tmp_path / "a.pt")
    assert read_source(tmp_path / "a.pt").weights["a"] == averaged
