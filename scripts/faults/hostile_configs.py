"""R15: configurations in files of strangers that name what would run, write, load or tell."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf, open_dict

import dyndet
from dyndet.calibrate import calibrate
from dyndet.cli.compose import compose_command, compose_experiment
from dyndet.errors import UserError
from dyndet.evaluate import evaluate
from dyndet.predict import predict
from dyndet.train import train
from faults import runs
from faults.row import Outcome, Row

SECRET = "DYNDET_SECRET"

# Each with arguments that touch {mark} if it is called.
TARGETS: dict[str, list[Any]] = {
    "os.system": ["touch {mark}"],
    "os.popen": ["touch {mark}"],
    "os.mkdir": ["{mark}"],
    "os.symlink": ["/", "{mark}"],
    "os.rename": ["{other}", "{mark}"],
    "os.remove": ["{other}"],
    "os.getenv": [SECRET],
    "posix.system": ["touch {mark}"],
    "subprocess.run": [["touch", "{mark}"]],
    "subprocess.Popen": [["touch", "{mark}"]],
    "subprocess.check_output": [["touch", "{mark}"]],
    "builtins.exec": ["open('{mark}', 'w')"],
    "builtins.eval": ["open('{mark}', 'w')"],
    "builtins.open": ["{mark}", "w"],
    "builtins.__import__": ["antigravity"],
    "io.open": ["{mark}", "w"],
    "io.FileIO": ["{mark}", "w"],
    "codecs.open": ["{mark}", "w"],
    "pathlib.Path.touch": ["{mark}"],
    "shutil.copy": ["{other}", "{mark}"],
    "shutil.move": ["{other}", "{mark}"],
    "shutil.rmtree": ["{folder}"],
    "tempfile.mkdtemp": ["", "", "{folder}"],
    "zipfile.ZipFile": ["{mark}", "w"],
    "tarfile.open": ["{mark}", "w"],
    "sqlite3.connect": ["{mark}"],
    "logging.FileHandler": ["{mark}"],
    "numpy.save": ["{mark}", [1]],
    "numpy.savetxt": ["{mark}", [1.0]],
    "numpy.load": ["{other}", None, True],
    "numpy.memmap": ["{mark}", "uint8", "w+", 0, 4],
    "torch.save": [[1], "{mark}"],
    "torch.load": ["{other}", None, None],
    "torch.hub.load": ["{folder}", "run"],
    "torch.hub.download_url_to_file": ["file://{other}", "{mark}"],
    "torch.ops.load_library": ["{other}"],
    "torch.utils.cpp_extension.load": ["x", ["{other}"]],
    "importlib.import_module": ["antigravity"],
    "runpy.run_path": ["{other}"],
    "pickle.loads": [b"cos\nsystem\n(S'touch {mark}'\ntR."],
    "ctypes.CDLL": ["{other}"],
    "urllib.request.urlretrieve": ["file://{other}", "{mark}"],
    "socket.create_connection": [["127.0.0.1", 9]],
    "threading.Timer": [0, {"_target_": "os.system", "_partial_": True, "command": "touch {mark}"}],
    "functools.partial": [{"_target_": "os.system", "_partial_": True}, "touch {mark}"],
    "hydra.utils.instantiate": [{"_target_": "os.mkdir", "path": "{mark}"}],
    "hydra.utils.call": [{"_target_": "os.mkdir", "path": "{mark}"}],
    "hydra.utils.get_method": ["os.system"],
    "hydra._internal.utils._locate": ["os.system"],
    "omegaconf.OmegaConf.load": ["{other}"],
    "omegaconf.OmegaConf.save": [{"a": 1}, "{mark}"],
    "timm.create_model": ["hf-hub:somebody/model"],
    "torchvision.datasets.utils.download_url": ["file://{other}", "{folder}", "mark"],
    "lightning.pytorch.Trainer": [],
    "lightning.pytorch.loggers.CSVLogger": ["{mark}"],
    "dyndet.data.images.Path.write_text": ["{mark}", "x"],
    "dyndet.data.images.Image.open": ["{other}"],
    "dyndet.checkpoints.read.torch.save": [[1], "{mark}"],
    "dyndet.checkpoints.read.write_calibration": ["{other}", {}],
    "dyndet.cli.compose.build": [{"_target_": "os.mkdir", "path": "{mark}"}],
    "dyndet.train.train": [],
    "dyndet.convert.source.read_source": ["{other}"],
}

PLACES = [
    "detector", "detector/preprocess", "preprocess", "backbone", "neck", "head", "head/activation", "predictor",
    "predictor/postprocess", "budget", "precision", "data/module", "data/module/train", "data/module/val",
    "data/module/train_transform", "data/module/val_transform", "data/module/train_mix", "data/module/folder",
    "data/anything", "anything", "router", "name",
]  # fmt: skip
FORMS = ["plain", "partial", "list", "argument", "in a part of ours", "keyword"]


def hostile(folder: Path) -> Iterator[Outcome]:
    os.environ[SECRET] = "s3cret"
    entries = _entries(folder)
    base: Any = OmegaConf.to_container(compose_experiment("shapes_dyn"))
    other, file = folder / "other.txt", folder / "file.ckpt"
    other.write_text("import os")
    for number, (target, place) in enumerate((target, place) for place in PLACES for target in TARGETS):
        config, form = deepcopy(base), FORMS[number % len(FORMS)]
        names = {"mark": str(folder / "mark"), "other": str(other), "folder": str(folder)}
        _put(config, place, _formed({"_target_": target, "_args_": _filled(TARGETS[target], names)}, form))
        torch.save({"state_dict": {}, "dyndet": {"config": config, "categories": []}}, file)
        before = _state(folder)
        for entry, call in entries.items():
            with runs.quiet() as said:
                error = _error(call, file)
            found = [] if isinstance(error, UserError) and "trust=true" in str(error) else [repr(error)[:120]]
            found += ["files were touched"] if _state(folder) != before else []
            found += ["the secret was told"] if "s3cret" in f"{error}{said.getvalue()}" else []
            yield Outcome(f"{target} at {place}, {form}, {entry}", not found, "; ".join(found))


def secrets(folder: Path) -> Iterator[Outcome]:
    """References to the environment, in a file: refused; of one's own command line: logged by their names."""
    os.environ[SECRET] = "s3cret"
    base: Any = OmegaConf.to_container(compose_experiment("shapes_dyn"))
    texts = [f"${{oc.env:{SECRET}}}", f"a/${{oc.env:{SECRET},x}}/b", f"${{oc.decode:${{oc.env:{SECRET}}}}}"]
    texts += [f"${{oc.select:nothing,${{oc.env:{SECRET}}}}}", f"\\${{oc.env:{SECRET}}}", "${hydra:job.name}"]
    file = folder / "file.ckpt"
    for place in [*PLACES, "logger/csv/name", "optim/note", "trainer/note"]:
        for text in texts:
            config = deepcopy(base)
            _put(config, place, text)
            torch.save({"state_dict": {}, "dyndet": {"config": config, "categories": []}}, file)
            error = _error(lambda path: dyndet.load_detector(path), file)
            refused = isinstance(error, UserError) and "s3cret" not in str(error)
            yield Outcome(f"{text} at {place}", refused, repr(error)[:120])
    for number, logger in enumerate(("csv", "tensorboard", "csv,tensorboard")):
        keys = [f"logger=[{logger}]", f"+note=${{oc.env:{SECRET}}}", "+more=a/${note}/b", "trainer.max_epochs=1"]
        runs.run("fine-grained", folder / str(number), *keys)
        told = [
            path.name for path in (folder / str(number)).rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()
        ]
        yield Outcome(f"own command, logger=[{logger}]", not told, ", ".join(told))


def _entries(folder: Path) -> dict[str, Callable[[Path], object]]:
    """Every way in which a file's configuration is built."""
    out = [f"output_dir={folder}/out"]
    evaluation = compose_command("evaluate", ["ckpt=x", *out, "trainer.accelerator=cpu"])
    prediction = compose_command("predict", ["ckpt=x", f"source={folder}/other.txt", f"out={folder}/out", "device=cpu"])
    calibration = compose_command("calibrate", ["ckpt=x", *out, "device=cpu"])
    start = compose_experiment("shapes_dyn", ["init=x", "data.train_images=4", *out, "trainer.accelerator=cpu"])
    step2 = ["+router=exact", "init=x", "data.train_images=4", *out]
    router = compose_experiment("shapes_dy_tiny", [*step2, "trainer.accelerator=cpu"])

    def through(task: Callable[[Any], object], config: Any, key: str) -> Callable[[Path], object]:
        def call(path: Path) -> object:
            given = config.copy()
            with open_dict(given):
                given[key] = str(path)
            return task(given)

        return call

    return {
        "load_detector": dyndet.load_detector,
        "evaluate": through(evaluate, evaluation, "ckpt"),
        "predict": through(predict, prediction, "ckpt"),
        "calibrate": through(calibrate, calibration, "ckpt"),
        "init": through(train, start, "init"),
        "router": through(train, router, "init"),
    }


def _error(call: Callable[[Path], object], file: Path) -> BaseException | None:
    try:
        call(file)
    except BaseException as error:
        return error
    return None


def _state(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_size) for path in folder.rglob("*"))


def _filled(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, str):
        for name, text in names.items():
            value = value.replace(f"{{{name}}}", text)
        return value
    if isinstance(value, bytes):
        return value.replace(b"{mark}", names["mark"].encode())
    if isinstance(value, list):
        return [_filled(item, names) for item in value]
    return {key: _filled(item, names) for key, item in value.items()} if isinstance(value, dict) else value


def _formed(payload: dict[str, Any], form: str) -> Any:
    part = {"_target_": "dyndet.models.heads.plain.PlainHead", "_partial_": True}
    return {
        "plain": payload,
        "partial": {**payload, "_partial_": True, "_convert_": "all"},
        "list": [[payload]],
        "argument": {"_target_": "dyndet.data.transforms.Compose", "_args_": [[payload]]},
        "in a part of ours": {**part, "channels": payload},
        "keyword": {"_target_": payload["_target_"], "_recursive_": False, "anything": payload},
    }[form]


def _put(config: Any, place: str, value: Any) -> None:
    *parents, last = place.split("/")
    for parent in parents:
        if not isinstance(config.get(parent), dict):
            config[parent] = {}
        config = config[parent]
    config[last] = value


ROWS = [
    Row(
        "R15.1",
        f"a file's configuration names any of {len(TARGETS)} functions, at {len(PLACES)} places, in {len(FORMS)} "
        "forms, through load_detector, evaluate, predict, calibrate, init and the router's init",
        "refused in one line; nothing is executed, no file touched, no secret told",
        hostile,
        300,
    ),
    Row(
        "R15.2",
        "references to the environment in files and in one's own configuration",
        "refused in files; loggers get the names of variables, not their values",
        secrets,
        60,
    ),
]
