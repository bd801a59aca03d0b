"""Checkpoints of strangers: their configuration must not run code, read the environment, or reach beyond our parts."""

from __future__ import annotations

import io
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

import dyndet
from dyndet.calibrate import calibrate
from dyndet.checkpoints.read import read_checkpoint
from dyndet.checkpoints.trusted import CONSTRUCTORS, UNBUILT, check_stored
from dyndet.cli.compose import build, compose_command, compose_experiment
from dyndet.errors import UserError
from dyndet.evaluate import evaluate
from dyndet.models.heads.fine_grained import FineGrainedHead
from dyndet.predict import predict
from dyndet.train import train

CONF = Path(__file__).parents[2] / "conf"
TINY = [
    "data.size=64", "data.train_images=4", "data.val_images=4", "data.batch_size=2", "head.depth=1", "neck.channels=16",
    "head.norm_groups=4", "trainer.accelerator=cpu",
]  # fmt: skip
Payload = dict[str, Any]


class OwnHead(FineGrainedHead):
    """A user's part."""


def touch(mark: Path) -> Payload:
    return {"_target_": "pathlib.Path.touch", "_args_": [{"_target_": "pathlib.Path", "_args_": [str(mark)]}]}


class Bomb:
    """Pickled, it touches a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return (Path.touch, (self.mark,))


def pickled(mark: Path) -> Payload:
    """A whole pickle within the configuration."""
    buffer = io.BytesIO()
    torch.save(Bomb(mark), buffer)
    stream = {"_target_": "io.BytesIO", "_args_": [buffer.getvalue()]}
    return {"_target_": "torch.load", "f": stream, "weights_only": False}


def chained(mark: Path) -> Payload:
    """Through what one of our modules imports."""
    path = {"_target_": "dyndet.data.images.Path", "_args_": [str(mark)]}
    return {"_target_": "dyndet.data.images.Path.write_text", "_args_": [path, "x"]}


PAYLOADS: dict[str, Callable[[Path], Payload]] = {
    "torch.load": pickled,
    "touch": touch,
    "chain": chained,
    "savetxt": lambda mark: {"_target_": "numpy.savetxt", "fname": str(mark), "X": [1.0]},
    "copy": lambda mark: {"_target_": "shutil.copy", "src": __file__, "dst": str(mark)},
    "open": lambda mark: {"_target_": "io.open", "file": str(mark), "mode": "w"},
    "torch.save": lambda mark: {"_target_": "torch.save", "obj": [1], "f": str(mark)},
    "hub": lambda mark: {"_target_": "torch.hub.load", "_args_": [str(mark.parent), "run"], "source": "local"},
}


@cache
def stored() -> tuple[Payload, dict[str, torch.Tensor], list[dict[str, Any]]]:
    """What training writes: configuration, weights, categories."""
    config = compose_experiment("shapes_dyn", TINY)
    weights = {f"detector.{key}": value for key, value in build(config.detector).state_dict().items()}
    data = build(config.data.module)
    data.setup("validate")
    content: Any = OmegaConf.to_container(config)
    return content, weights, [{"id": item.id, "name": item.name} for item in data.categories]


def checkpoint(folder: Path, *changes: tuple[str, Any]) -> Path:
    """A checkpoint with keys of its configuration set, as plain data."""
    config, weights, categories = stored()
    config = deepcopy(config)
    for key, value in changes:
        *parents, last = key.split("/")
        node: Any = config
        for parent in parents:
            node = node[int(parent) if isinstance(node, list) else parent]
        node[last] = value
    (folder / "hubconf.py").write_text("def run():\n    open(__file__ + '.ran', 'w')\n")
    torch.save({"state_dict": weights, "dyndet": {"config": config, "categories": categories}}, folder / "file.ckpt")
    return folder / "file.ckpt"


def assert_refused(run: Callable[[], object], file: Path, *words: str) -> None:
    before = set(file.parent.rglob("*"))
    with pytest.raises(UserError) as error:
        run()
    message = str(error.value)
    assert len(message.splitlines()) == 1
    for word in (str(file), "trust=true", "trust=True", *words):
        assert word in message
    assert set(file.parent.rglob("*")) == before  # nothing ran


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_head_that_is_any_call_is_refused(tmp_path: Path, name: str) -> None:
    payload = PAYLOADS[name](tmp_path / "mark")
    file = checkpoint(tmp_path, ("head", payload))
    assert_refused(lambda: dyndet.load_detector(file), file, "head._target_", payload["_target_"])


@pytest.mark.parametrize("name", PAYLOADS)
def test_the_attacks_are_real(tmp_path: Path, name: str) -> None:
    """With trust they run: what the other tests refuse is not harmless for another reason."""
    file = checkpoint(tmp_path, ("head", PAYLOADS[name](tmp_path / "mark")))
    try:
        dyndet.load_detector(file, trust=True)
    except Exception as error:  # what they return is no head
        print(error)
    assert (tmp_path / "mark").exists() or (tmp_path / "hubconf.py.ran").exists()


PLACES = [
    "detector", "detector/preprocess", "preprocess", "backbone", "neck", "head/activation", "predictor/postprocess",
    "budget", "precision", "data/module", "data/module/train", "data/module/val", "data/module/val_transform",
    "data/module/anything", "data/anything", "anything", "router", "name",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_it_is_refused_wherever_it_stands(tmp_path: Path, place: str) -> None:
    file = checkpoint(tmp_path, (place, touch(tmp_path / "mark")))
    assert_refused(lambda: read_checkpoint(file), file, f"{place.replace('/', '.')}._target_", "pathlib.Path.touch")


HIDDEN: dict[str, tuple[str, Any, str]] = {
    "in a list": ("data/module/val_transform", [{"_target_": "os.getcwd"}], "data.module.val_transform[0]._target_"),
    "in lists of lists": ("data/module/val_transform", [[[{"_target_": "os.getcwd"}]]], "[0][0][0]._target_"),
    "in a tuple": ("data/module/x", ({"_target_": "os.getcwd"},), "data.module.x[0]._target_"),
    "in arguments by place": ("head/_args_", [{"_target_": "os.getcwd"}], "head._args_[0]._target_"),
    "arguments by reference": ("head/_args_", "${name}", "head._args_"),
    "partly called": ("head", {"_target_": "os.getcwd", "_partial_": True}, "head._target_"),
    "partly by reference": ("head/_partial_", "${channels_last}", "head._partial_"),
    "not recursive, by a word": ("head/_recursive_", "no", "head._recursive_"),
    "converted by a number": ("head/_convert_", 1, "head._convert_"),
    "a target by reference": ("head/_target_", "${name}", "head._target_"),
    "a target that is missing": ("head/_target_", "???", "head._target_"),
    "a target that is none": ("head/_target_", None, "head._target_"),
    "a target that is a list": ("head/_target_", ["os.getcwd"], "head._target_"),
    "a target with a space": ("head/_target_", " dyndet.models.heads.plain.PlainHead", "head._target_"),
    "a module of ours, another name": (
        "head/_target_",
        "dyndet.models.backbones.weights.read_weights",
        "head._target_",
    ),
    "weights that would be fetched": (
        "detector/backbone",
        {"_target_": "dyndet.models.backbones.timm.TimmBackbone", "name": "resnet50", "weights": "timm"},
        "detector.backbone.weights",
    ),
    "weights behind a key without a name": (
        "",
        {"backbone": {"_target_": "dyndet.models.backbones.timm.TimmBackbone", "name": "resnet50", "weights": "timm"}},
        "backbone.weights",
    ),
    "under a key with dots": ("head.activation", {"_target_": "os.getcwd"}, "head.activation._target_"),
    "under a number": ("data/module/x", {3: {"_target_": "os.getcwd"}}, "data.module.x.3._target_"),
    "by reference to training": ("head", "${optim.optimizer}", "head"),
    "by reference into training": ("predictor/postprocess", "${trainer.precision}", "predictor.postprocess"),
    "by a choice in training": ("head", "${oc.select:callbacks.best,1}", "head"),
    "by brackets": ("head", "${[optim].optimizer}", "head"),
    "relative": ("head/x", "${..optim}", "head.x"),
    "the environment": ("data/root", "${oc.env:HOME}", "data.root"),
    "the environment, unseen by training": ("logger/csv/name", "${oc.env:HOME}", "logger.csv.name"),
    "the environment in a path": ("data/root", "/data/${oc.env:HOME}/x", "data.root"),
    "nested": ("data/root", "${data.${oc.env:HOME}}", "data.root"),
    "in a default": ("data/root", "${oc.select:nothing,${oc.env:HOME}}", "data.root"),
    "escaped": ("data/root", "\\${oc.env:HOME}", "data.root"),
    "decoded": ("head/x", "${oc.decode:name}", "head.x"),
    "created": ("head", "${oc.create:{a: 1}}", "head"),
    "with space": ("data/root", "${ oc.env:HOME }", "data.root"),
    "put together": ("data/root", "$${name}", "data.root"),
    "put together of two": ("name", "$", "name"),
    "in bytes, which become text": ("name", b"${oc.env:HOME}", "name"),
    "in a key of bytes": ("data/module/x", {b"${oc.env:HOME}": 1}, "data.module.x.b'${oc.env:HOME}'"),
    "in a key": ("data/module/${oc.env:HOME}", 1, "data.module.${oc.env:HOME}"),
    "lines in a key": ("data/module/a\nb", {"_target_": "os.getcwd"}, "data.module.a\\nb._target_"),
    "lines in a target": ("head/_target_", "os\n.getcwd", "head._target_"),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_ones_are_refused_by_their_key(tmp_path: Path, name: str) -> None:
    place, value, key = HIDDEN[name]
    file = checkpoint(tmp_path, (place, value))
    assert_refused(lambda: read_checkpoint(file), file, f"{key}' is" if "\\n" in key else f"{key} is")


def test_what_references_put_together_would_be_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why a lone dollar is refused: building resolves first and reads what came out once more."""
    monkeypatch.setenv("DYNDET_SECRET", "secret")
    config = DictConfig(
        {"a": "$", "b": "{oc.env:DYNDET_SECRET}", "data": {"_target_": "builtins.dict", "x": "${a}${b}"}}
    )
    assert build(config.data)["x"] == "secret"
    with pytest.raises(UserError, match="in its configuration a is"):
        check_stored(config, source="x.ckpt")


def test_bytes_would_be_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNDET_SECRET", "secret")
    config = DictConfig({"a": b"${oc.env:DYNDET_SECRET}", "data": {"_target_": "builtins.dict", "x": "${a}."}})
    assert build(config.data)["x"] == "b'secret'."
    with pytest.raises(UserError, match=r"a is b'.*which is no plain value, but bytes"):
        check_stored(config, source="x.ckpt")


@pytest.mark.parametrize("weights", ["timm", "/etc/passwd"])
def test_no_reference_reaches_weights(tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transform that is the backbone, which would fetch its weights, or open a file."""
    file = checkpoint(tmp_path, ("backbone/weights", weights), ("data/module/val_transform", ["${backbone}"]))
    monkeypatch.setattr("dyndet.models.backbones.timm.load_backbone_weights", lambda *_: pytest.fail("a file is read"))
    saved = read_checkpoint(file).config
    assert saved.backbone.weights == saved.data.module.val_transform[0].weights == "none"
    build(saved.data.module.val_transform[0])


def test_what_is_shared_is_not_written_out_without_limit(tmp_path: Path) -> None:
    node: Any = 1
    for _ in range(40):
        node = [node, node]
    file = checkpoint(tmp_path, ("anything", node))
    with pytest.raises(UserError, match="holds a configuration of more than"):
        read_checkpoint(file)


@pytest.mark.parametrize("entry", [{}, None, [], {"config": {}}, {"config": {}, "categories": [1]}])
def test_what_lacks_a_part_is_refused(tmp_path: Path, entry: Any) -> None:
    torch.save({"state_dict": {}, "dyndet": entry}, tmp_path / "file.ckpt")
    with pytest.raises(UserError, match=r"file\.ckpt holds"):
        read_checkpoint(tmp_path / "file.ckpt")


@pytest.mark.parametrize(("stored", "now"), [(0, -1), (2, 1), (5, 4)])
def test_frozen_stages_of_old_files_counted_the_stem(tmp_path: Path, stored: int, now: int) -> None:
    old = "dyndet.models.backbone.TimmBackbone"
    file = checkpoint(tmp_path, ("backbone/_target_", old), ("backbone/frozen_stages", stored))
    assert read_checkpoint(file).config.backbone.frozen_stages == now
    file = checkpoint(tmp_path, ("backbone/frozen_stages", stored))
    assert read_checkpoint(file).config.backbone.frozen_stages == stored


@pytest.mark.parametrize("value", [None, "a", [1], "${name}", {"x": {3, 4}}, {"x": "${name"}])
def test_what_is_no_configuration_is_refused(tmp_path: Path, value: Any) -> None:
    torch.save({"state_dict": {}, "dyndet": {"config": value, "categories": []}}, tmp_path / "file.ckpt")
    with pytest.raises(UserError, match=r"file\.ckpt holds"):
        read_checkpoint(tmp_path / "file.ckpt")


@pytest.mark.parametrize("command", ["evaluate", "predict", "calibrate", "train", "router"])
def test_commands_refuse_it_in_data_and_detector(tmp_path: Path, command: str) -> None:
    val_transform = ("data/module/val_transform", [touch(tmp_path / "mark")])
    file = checkpoint(tmp_path, val_transform)
    tasks: dict[str, Callable[[], object]] = {
        "evaluate": lambda: evaluate(compose_command("evaluate", [f"ckpt={file}", f"output_dir={tmp_path}"])),
        "predict": lambda: predict(
            compose_command("predict", [f"ckpt={file}", f"source={CONF.parent}/docs/preview.png", f"out={tmp_path}"])
        ),
        "calibrate": lambda: calibrate(compose_command("calibrate", [f"ckpt={file}", f"output_dir={tmp_path}"])),
        "train": lambda: train(compose_experiment("shapes_dyn", [*TINY, f"init={file}", f"output_dir={tmp_path}"])),
        "router": lambda: train(
            compose_experiment("shapes_dy_tiny", ["+router=exact", f"init={file}", f"output_dir={tmp_path}"])
        ),
    }
    assert_refused(tasks[command], file, "data.module.val_transform[0]._target_", "pathlib.Path.touch")


@pytest.mark.parametrize("place", ["trainer/precision", "trainer"])
def test_precision_of_a_file_is_a_word(tmp_path: Path, place: str) -> None:
    """Evaluation takes it from the file's trainer, whose other settings it does not use, and builds its own trainer."""
    mark, value = tmp_path / "mark", touch(tmp_path / "mark")
    file = checkpoint(tmp_path, ("optim/precision", value), (place, value if "/" in place else "${optim}"))
    with pytest.raises(UserError, match=r"file\.ckpt: trainer\.precision") as error:
        evaluate(compose_command("evaluate", [f"ckpt={file}", f"output_dir={tmp_path}", "trainer.accelerator=cpu"]))
    assert len(str(error.value).splitlines()) == 1
    assert not mark.exists()


def test_a_users_own_part_is_trusted_on_request(tmp_path: Path) -> None:
    own = f"{__name__}.OwnHead"
    file = checkpoint(tmp_path, ("head/_target_", own))
    assert_refused(lambda: dyndet.load_detector(file), file, "head._target_", own)
    for word in ("no", "false", 1):  # anything but true
        with pytest.raises(UserError, match="OwnHead"):
            dyndet.load_detector(file, trust=word)  # type: ignore[arg-type]
    assert isinstance(dyndet.load_detector(file, trust=True).get_submodule("head"), OwnHead)
    keys = [f"ckpt={file}", f"output_dir={tmp_path}", "trainer.accelerator=cpu", "trust=true"]
    assert evaluate(compose_command("evaluate", keys))["macs/total_mean"] > 0


def test_settings_of_training_may_name_anything(tmp_path: Path) -> None:
    """They are never built from a file: own optimizers and callbacks need no trust."""
    payload = touch(tmp_path / "mark")
    groups = UNBUILT & compose_experiment("shapes_dyn").keys()
    file = checkpoint(tmp_path, *((f"{group}/own", payload) for group in groups))
    dyndet.load_detector(file)
    keys = [f"ckpt={file}", f"output_dir={tmp_path}"]
    evaluate(compose_command("evaluate", [*keys, "trainer.accelerator=cpu"]))
    predict(compose_command("predict", [f"ckpt={file}", f"source={CONF.parent}/docs/preview.png", f"out={tmp_path}"]))
    calibrate(compose_command("calibrate", [*keys, "device=cpu", "latency_images=0", "thresholds=[0.0]"]))
    train(compose_experiment("shapes_dyn", [*TINY, f"init={file}", f"output_dir={tmp_path}", "trainer.max_steps=1"]))
    assert not (tmp_path / "mark").exists()


OPTIONS = [
    ("shapes_dyn", ["data=voc"]), ("shapes_dyn", ["data=yolo"]), ("shapes_dyn", ["data=bccd"]), ("fcos_d8_dyn", []),
    ("fcos_d8_dyn", ["+data/augment=yolo"]), ("fcos_d8_dyn", ["+data/augment=yolo_light"]),
    ("mask_rcnn_r50", ["+data/augment=yolo_masks"]), ("dy_yolov7", ["+router=yolo"]),
    ("dy_faster_rcnn_r50", ["+router=online"]), ("shapes_dy_tiny", ["+router=exact"]),
    ("shapes_dyn", ["head/activation=softmax", "preprocess=yolo", "callbacks=[default,ema]", "logger=[csv,wandb]"]),
    ("shapes_dyn", ["+data.root=price$tag"]),
]  # fmt: skip


@pytest.mark.parametrize(("experiment", "overrides"), OPTIONS)
def test_what_training_writes_needs_no_trust(experiment: str, overrides: list[str]) -> None:
    """The experiments as they are: tests/test_config.py."""
    check_stored(compose_experiment(experiment, overrides), source="x.ckpt")


def targets(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {node["_target_"]} if "_target_" in node else set()
        return own.union(*map(targets, node.values()))
    return set().union(*map(targets, node)) if isinstance(node, list) else set()


def test_every_part_that_our_configurations_name_is_listed() -> None:
    named = {
        target
        for path in CONF.rglob("*.yaml")
        for target in targets(OmegaConf.to_container(OmegaConf.load(path), resolve=False))
        if target.startswith(("dyndet.models.", "dyndet.data."))
    }
    assert len(named) > 40
    assert named <= CONSTRUCTORS


@pytest.mark.parametrize("name", sorted(CONSTRUCTORS))
def test_listed_names_are_of_the_module_that_defines_them(name: str) -> None:
    """So none is reached through an import."""
    part = resolve_name(name)
    assert callable(part)
    assert f"{part.__module__}.{part.__qualname__}" == name
    assert name.startswith(("dyndet.models.", "dyndet.data."))


def test_a_file_does_not_make_timm_ask_a_hub(tmp_path: Path) -> None:
    file = checkpoint(tmp_path, ("backbone/name", "hf-hub:somebody/model"))
    with pytest.raises(UserError, match="is no model of timm"):
        dyndet.load_detector(file)
