"""Files that are not what they should be get one line; nothing in a file runs unless it is trusted."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import pytest
import torch
from released_layouts import RELEASES, marked
from torch import Tensor

from commands import forked
from dyndet.cli.compose import build, compose_command, compose_experiment
from dyndet.convert import read_release
from dyndet.convert.__main__ import convert
from dyndet.convert.source import read_source
from dyndet.errors import UserError
from dyndet.structures import ImageBatch

RAN: list[str] = []


def leave_a_trace(text: str) -> str:
    RAN.append(text)
    return text


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return leave_a_trace, ("ran",)


def refused(path: Path, *parts: str, trust: bool = False) -> None:
    with pytest.raises(UserError) as error:
        read_source(path, trust=trust)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    for part in parts:
        assert part in message


def test_missing(tmp_path: Path) -> None:
    refused(tmp_path / "nothing.pth", "no file")
    refused(tmp_path, "no file")


def test_text(tmp_path: Path) -> None:
    file = tmp_path / "page.pth"
    file.write_text("<html>404</html>")
    refused(file, "not a checkpoint")
    file.write_bytes(b"")
    refused(file, "not a checkpoint")


@pytest.mark.parametrize("kind", ["torch", "legacy", "pickle", "safetensors"])
def test_half_a_file(kind: str, tmp_path: Path) -> None:
    file = tmp_path / ("release.safetensors" if kind == "safetensors" else "release.pth")
    weights = {"a": torch.randn(1000), "b": torch.randn(1000)}
    if kind == "safetensors":
        from safetensors.torch import save_file

        save_file(weights, file)
    elif kind == "pickle":
        file.write_bytes(pickle.dumps({"model": {name: value.numpy() for name, value in weights.items()}}))
    else:
        torch.save(weights, file, _use_new_zipfile_serialization=kind == "torch")
    assert set(read_source(file).weights) == {"a", "b"}
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused(file, "damaged or only half there")


def test_our_own(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    torch.save({"dyndet": {"config": {}, "categories": []}, "state_dict": {}}, file)
    refused(file, "is a checkpoint of dyndet already")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": 3}, torch.zeros(3)])
def test_no_tensors_by_name(content: object, tmp_path: Path) -> None:
    file = tmp_path / "other.pth"
    torch.save(content, file)
    refused(file, "holds")


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_code_runs_only_when_trusted(kind: str, tmp_path: Path) -> None:
    RAN.clear()
    file = tmp_path / "release.pth"
    content = {"state_dict": {"a": torch.zeros(3) if kind == "torch" else torch.zeros(3).numpy()}, "hook": Harmful()}
    if kind == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    refused(file, "leave_a_trace", "trust=true")
    assert not RAN
    assert set(read_source(file, trust=True).weights) == {"a"}
    assert RAN == ["ran"]


def test_trusted_but_not_installed(tmp_path: Path) -> None:
    file = tmp_path / "release.pth"
    file.write_bytes(b"\x80\x02cnot_installed_here\nThing\n)R.")
    refused(file, "not_installed_here.Thing", "trust=true")
    refused(file, "'not_installed_here'", "install it", trust=True)


def test_a_pickle_of_arrays(tmp_path: Path) -> None:
    """detectron2's model zoo; older protocols and names of numpy as well."""
    release = RELEASES["detectron2 faster_rcnn"]
    file = tmp_path / "model_final.pkl"
    arrays = {name: value.numpy() for name, value in marked(release.shapes).items()}
    small = {name: value for name, value in arrays.items() if value.nbytes < 1000}
    for protocol in range(2, 6):
        content = pickle.dumps({"model": small, "__author__": "nobody"}, protocol=protocol)
        file.write_bytes(
            content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray") if protocol < 4 else content
        )
        found = read_source(file).weights
        assert all(torch.equal(found[name], torch.from_numpy(value.copy())) for name, value in small.items())
    file.write_bytes(pickle.dumps({"model": arrays}, protocol=4))
    assert read_release(file).experiment == release.experiment


def test_prefix_of_parallel_training(tmp_path: Path) -> None:
    release = RELEASES["mmdet retinanet_r50"]
    file = tmp_path / "release.pth"
    torch.save({"state_dict": {f"module.{name}": value.half() for name, value in marked(release.shapes).items()}}, file)
    converted = read_release(file)
    assert converted.experiment == release.experiment
    assert converted.state_dict["predictor.cls.weight"].dtype == torch.float32


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    release = RELEASES["fcos fixed D4"]
    file = tmp_path / "release.pth"
    weights = marked(release.shapes)
    del weights["head.cls_subnet.2.output_weight"]
    weights["head.mask.weight"] = torch.zeros(1)
    weights["head.bbox_pred.bias"] = torch.zeros(5)
    torch.save({"model": weights}, file)
    with pytest.raises(UserError) as error:
        read_release(file)
    message = str(error.value)
    assert "1 missing: head.cls.2.output_weight" in message
    assert "1 left over: head.mask.weight" in message
    assert "1 of another shape: predictor.box.bias (5,) instead of (4,)" in message
    assert "fcos_d8" in message and "\n" not in message


def test_another_model(tmp_path: Path) -> None:
    file = tmp_path / "release.pth"
    torch.save({"state_dict": {"encoder.weight": torch.zeros(3)}}, file)
    with pytest.raises(UserError, match="of no source that dyndet knows"):
        read_release(file)
    shapes = {f"neck.{name}": (1,) for name in ("lateral_convs.0.conv.bias",)} | {"bbox_head.gfl_cls.bias": (80,)}
    torch.save({"state_dict": marked(shapes)}, file)
    with pytest.raises(UserError, match="whose head dyndet does not have"):
        read_release(file)


def test_a_head_without_boxes(tmp_path: Path) -> None:
    file = tmp_path / "release.pth"
    weights = marked(RELEASES["mmdet retinanet_r50"].shapes)
    del weights["bbox_head.retina_reg.weight"]
    torch.save({"state_dict": weights}, file)
    with pytest.raises(UserError, match=r"lacks a part of its head.*retina_reg"):
        read_release(file)


def test_another_experiment(tmp_path: Path) -> None:
    file = tmp_path / "release.pth"
    torch.save({"model": marked(RELEASES["fcos dynamic D4"].shapes)}, file)
    with pytest.raises(UserError, match="is a release of fcos_d8_dyn, not of retinanet_r50"):
        read_release(file, "retinanet_r50")
    with pytest.raises(UserError, match="there is no experiment 'fcos_d4_dynamic'"):
        read_release(file, "fcos_d4_dynamic")


def with_pixels(file: Path, mean: Tensor, std: Tensor) -> Path:
    weights = marked(RELEASES["authors dyhead atss"].shapes) | {"pixel_mean": mean, "pixel_std": std}
    torch.save({"model": weights}, file)
    return file


def test_pixels_in_the_file_are_taken_over(tmp_path: Path) -> None:
    file = tmp_path / "release.pth"
    usual = torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)
    converted = read_release(with_pixels(file, usual, torch.ones(3, 1, 1)))
    assert "pixel_mean" in converted.report.unused and not converted.note
    assert not any(override.startswith("preprocess.") for override in converted.overrides)

    mean, std = torch.tensor([100.0, 110.5, 130.25]), torch.tensor([57.375, 57.12, 58.395])
    converted = read_release(with_pixels(file, mean.view(3, 1, 1), std))
    keys = [override.partition("=")[0] for override in converted.overrides]
    assert keys.count("preprocess.mean") == keys.count("preprocess.std") == 1
    for preprocess in (
        build(converted.config.preprocess),
        build(compose_experiment(converted.experiment, converted.overrides).preprocess),
    ):
        assert preprocess.bgr  # as before
        image = ImageBatch.of([torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1).expand(3, 32, 32)])
        expected = (torch.tensor([30.0, 20.0, 10.0]) - mean) / std
        torch.testing.assert_close(preprocess(image)[0, :, 5, 5], expected)


def test_the_usual_pixels_in_reverse_are_pointed_out(tmp_path: Path) -> None:
    reverse = torch.tensor([123.675, 116.28, 103.53])
    converted = read_release(with_pixels(tmp_path / "release.pth", reverse, torch.ones(3)))
    assert [255 * value for value in converted.config.preprocess.mean] == pytest.approx(reverse.tolist())
    assert "pixel_mean" in converted.note and "preprocess.bgr" in converted.note


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [
        ([100.0], [1.0, 1.0, 1.0], r"pixel_mean is \[100\.0\], not three numbers"),
        ([1.0] * 12, [1.0, 1.0, 1.0], r"pixel_mean is of shape \(12,\), not three numbers"),
        ([100.0, math.nan, 100.0], [1.0, 1.0, 1.0], "pixel_mean is .*nan.*, not three numbers"),
        ([100.0, 100.0, 100.0], [1.0, 0.0, 1.0], "pixel_std is .*, not three positive numbers"),
    ],
)
def test_pixels_that_make_no_sense_are_refused(mean: list[float], std: list[float], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as error:
        read_release(with_pixels(tmp_path / "release.pth", torch.tensor(mean), torch.tensor(std)))
    assert "\n" not in str(error.value)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "release.pth", tmp_path / "new" / "converted.ckpt"
    torch.save({"state_dict": marked(RELEASES["mmdet retinanet_r50"].shapes)}, file)
    assert convert(compose_command("convert", [f"source={file}", f"out={out}"])) == out
    printed = capsys.readouterr().out
    assert "as experiment retinanet_r50" in printed and "354 tensors used" in printed and "freeanchor_r50" in printed
    content = torch.load(out, weights_only=True)
    assert set(content) == {"dyndet", "state_dict"} and content["dyndet"]["config"]["name"] == "retinanet_r50"


def test_the_source_is_not_written_over(tmp_path: Path) -> None:
    file = tmp_path / "release.pth"
    torch.save({"state_dict": marked(RELEASES["mmdet retinanet_r50"].shapes)}, file)
    with pytest.raises(UserError, match="is the source"):
        convert(compose_command("convert", [f"source={file}", f"out={tmp_path}/./release.pth"]))


def test_the_command_line_answers_in_one_line(tmp_path: Path) -> None:
    done = forked(tmp_path, "convert", "source=nothing.pth", "out=converted.ckpt")
    assert done.returncode == 2 and done.stderr.startswith("error: no file at") and done.stderr.count("\n") == 1
    assert not (tmp_path / "converted.ckpt").exists()


@pytest.mark.parametrize("experiment", ["auto", "freeanchor_r50"])
def test_the_command_line_takes_an_experiment(experiment: str, tmp_path: Path) -> None:
    torch.save({"state_dict": marked(RELEASES["mmdet retinanet_r50"].shapes)}, tmp_path / "release.pth")
    done = forked(tmp_path, "convert", "source=release.pth", "out=out.ckpt", f"experiment={experiment}")
    assert done.returncode == 0, done.stderr
    assert f"as experiment {'retinanet_r50' if experiment == 'auto' else experiment}" in done.stdout


def test_a_misspelt_key_is_explained(tmp_path: Path) -> None:
    done = forked(tmp_path, "convert", "source=release.pth", "out=out.ckpt", "experimant=auto")
    assert done.returncode == 2
    assert "there is no key 'experimant' to set. Did you mean 'experiment'?" in done.stderr
