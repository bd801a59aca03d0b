"""What commands say about themselves. Read without Hydra and torch, so that help is there at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files

from dyndet import __version__

COMMANDS = {
    "train": "trains a detector, validates it, and shows where its compute went",
    "evaluate": "AP and executed compute of a checkpoint, on its own data or yours",
    "predict": "what a checkpoint finds in images and videos, as pictures and files",
    "calibrate": "measures the speeds of a dynamic detector and keeps them in its checkpoint",
    "report": "a table of runs, and a page of their curves, errors and pictures",
    "convert": "turns a checkpoint that another project released into one of dyndet",
    "doctor": "looks for what is wrong with a data set, before training finds out",
    "replay": "runs a step again whose loss was no number, and shows where that arose",
}
"""In the order in which one meets them."""

_EXAMPLES = {
    "evaluate": [
        "dyndet evaluate ckpt=RUN/checkpoints/best.ckpt",
        "dyndet evaluate ckpt=RUN/checkpoints/best.ckpt data.root=FOLDER data.batch_size=8",
        "dyndet evaluate ckpt=RUN/checkpoints/best.ckpt speed=latency_ms:12 latency=64",
    ],
    "predict": [
        "dyndet predict ckpt=RUN/checkpoints/best.ckpt source=photos",
        "dyndet predict ckpt=RUN/checkpoints/best.ckpt source='photos/*.jpg' gates=true score_threshold=0.5",
    ],
    "calibrate": [
        "dyndet calibrate ckpt=RUN/checkpoints/last.ckpt",
        "dyndet calibrate ckpt=RUN/checkpoints/last.ckpt images=200 out=calibrated.ckpt",
    ],
    "report": ["dyndet report runs=outputs/shapes_dyn", "dyndet report runs=multirun/shapes_dyn/DATE"],
    "convert": [
        "dyndet convert source=released.pth out=converted.ckpt",
        "dyndet convert source=released.pth out=converted.ckpt experiment=retinanet_r50",
    ],
    "doctor": ["dyndet doctor +experiment=finetune data=auto data.root=FOLDER"],
    "replay": ["dyndet replay file=RUN/dump_step_000123.pt"],
}

_TRAIN = """\
usage: dyndet train [key=value ...]

Trains, validates, and shows where compute went. Without arguments: generated shapes, minutes on a CPU.

What people set:
  data=auto data.root=FOLDER        the data, one of {data}, and where it lies
  +experiment=fcos_d8_dyn           a whole recipe, published or small; what else is set changes it
  head=fine_grained_small           plain heads, heads with gates, dynamic heads
  backbone=resnet50                 what turns pixels into features
  data.size=640                     input size in pixels
  data.batch_size=8                 images per step and process
  trainer.max_epochs=12             how long; or trainer.max_steps=..., time_limit=1h30m
  optim.optimizer.lr=0.005          the learning rate at its peak
  budget.weight=0.1                 the price of compute, for heads with gates
  trainer.devices=2 trainer.precision=16-mixed
                                    devices and number format; trainer.accelerator=cpu keeps off a GPU
  ckpt_path=last                    goes on with the newest run of this name, or with any checkpoint
  init=FILE                         starts a new run from the weights of another, or of a conversion

Examples:
  dyndet train
  dyndet train +experiment=finetune data=auto data.root=FOLDER
  dyndet train +experiment=fcos_d8_dyn data.root=/data/coco trainer.devices=8 data.batch_size=2
  dyndet train -m budget.weight=0,0.1,0.4 seed=0,1     a sweep: a job per combination; jobs done are not repeated

See everything:
  dyndet train --help groups        the choices of every part (head=..., neck=..., +experiment=..., ...)
  dyndet train KEY=VALUE --cfg job  every key with its value, as the run would have it
  dyndet train --hydra-help         Hydra's own flags, such as --config-dir
"""

_ADDED = ("experiment", "router", "sweep", "data/augment")
"""Groups from which nothing is chosen before: they are written with a +."""

_NOT_SHOWN = ("hydra", "trainer", "defaults", "output_dir")
"""Keys of Hydra and Lightning, which `--cfg job` prints."""


def overview(available: Sequence[str]) -> str:
    """The commands, in one screen.

    Args:
        available: of `COMMANDS`, those that are there.
    """
    lines = [f"  {name:<10} {COMMANDS[name]}" for name in available]
    examples = [
        "dyndet train +experiment=finetune data=auto data.root=FOLDER",
        "dyndet predict ckpt=outputs/NAME/DATE/checkpoints/best.ckpt source=photos",
        "dyndet report runs=outputs",
    ]
    return "\n".join([
        f"dyndet {__version__}: object detectors whose compute follows the input", "",
        "usage: dyndet COMMAND [key=value ...]", "", *lines, "",
        "Examples:", *(f"  {line}" for line in examples), "",
        "dyndet COMMAND --help says what a command takes; dyndet --version which one this is.",
    ])  # fmt: skip


def command_help(command: str, arguments: Sequence[str]) -> str | None:
    """What `dyndet COMMAND --help` prints, `--help groups` all choices; None where no help is asked for."""
    if not {"-h", "--help"} & set(arguments):
        return None
    if "groups" in arguments:
        return _choices(command, arguments)
    if command == "train":
        return _TRAIN.format(data=", ".join(_data()))
    keys = _keys(command)
    width = max(map(len, keys), default=0)
    examples = [f"  {line}" for line in _EXAMPLES.get(command, [])]
    summary = COMMANDS[command]
    return "\n".join([
        f"usage: dyndet {command} key=value ...", "", f"{summary[0].upper()}{summary[1:]}.", "",
        "Keys, as they are if not set:", *(f"  {key:<{width}}  {text}".rstrip() for key, text in keys.items()), "",
        "Examples:", *examples, "",
        f"dyndet {command} --cfg job prints all keys as they would be; --hydra-help lists Hydra's flags.",
    ])  # fmt: skip


def _keys(command: str) -> dict[str, str]:
    """From `key=value` to its comment in a command's configuration; keys that only experts set are left out."""
    places = (
        files("dyndet.conf").joinpath(command, f"{command}.yaml"),
        files("dyndet.conf").joinpath(f"{command}.yaml"),
    )
    text = next((file.read_text(encoding="utf-8") for file in places if file.is_file()), "")
    found, section = {}, ""
    for line in text.splitlines():
        match = re.fullmatch(r"( *)([a-z]\w*):(?: +([^#]*?))?(?: *# (.*))?", line)
        if match is None:
            continue
        indent, key, value, comment = match.groups(default="")
        if not indent:
            section = "" if value else key
        if section in _NOT_SHOWN or key in (section, *_NOT_SHOWN):
            continue
        name = f"{section}.{key}" if indent else key
        shown = "..." if len(value) > 40 or value in ("???", "null") or "$" in value else value
        if section == "data" and value == "null":
            comment = comment or "as in training"
        found[f"{name}={shown}"] = f"{'must be given: ' if value == '???' else ''}{comment}"
    return found


def _data() -> list[str]:
    names = (item.name for item in files("dyndet.conf").joinpath("data").iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml") and name != "files.yaml")


def _choices(command: str, arguments: Sequence[str]) -> str:
    """All groups with their choices, those of folders given by --config-dir included."""
    from hydra._internal.core_plugins.file_config_source import FileConfigSource
    from hydra.core.object_type import ObjectType

    from dyndet.cli.config_source import DyndetConfigSource

    if command != "train":
        return f"dyndet {command} has keys, but no groups to choose from: dyndet {command} --help"
    following = zip(arguments, [*arguments[1:], ""], strict=True)
    folders = [after if flag in ("--config-dir", "-cd") else flag.partition("=")[2] for flag, after in following
               if flag in ("--config-dir", "-cd") or flag.startswith("--config-dir=")]  # fmt: skip
    sources = [DyndetConfigSource("dyndet", "dyndet://conf")]
    sources += [FileConfigSource("user", f"file://{folder}") for folder in folders]

    def listed(path: str, kind: ObjectType) -> list[str]:
        return sorted({name for source in sources if source.is_group(path) for name in source.list(path, kind)})

    lines, groups = [], listed("", ObjectType.GROUP)
    while groups:
        group = groups.pop(0)
        groups = [f"{group}/{inner}" for inner in listed(group, ObjectType.GROUP)] + groups
        if options := listed(group, ObjectType.CONFIG):
            lines.append(f"{'+' if group in _ADDED else ''}{group}: {', '.join(options)}")
    return "\n".join([
        "Choices: GROUP=NAME takes another, +GROUP=NAME adds one. NAME_small is for small images.",
        "Several of callbacks or logger are a list: callbacks=[default,ema]", "", *lines, "",
        f"dyndet {command} GROUP=NAME --cfg job prints every key with its value.",
    ])  # fmt: skip
