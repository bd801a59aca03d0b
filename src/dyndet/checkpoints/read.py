"""Reading checkpoints: as a detector to use, or as a run to go on with. No code of a file runs unless trusted."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from dyndet.checkpoints.changes import check_categories, check_changes
from dyndet.checkpoints.trusted import check_stored
from dyndet.cli.latest import latest_checkpoint
from dyndet.cli.renamed import replacement
from dyndet.errors import UserError, reason
from dyndet.sealed import read_sealed, write_sealed
from dyndet.structures import Category

_MOST_VALUES = 20_000
_OLD_BACKBONE = "dyndet.models.backbone.TimmBackbone"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint of `dyndet.train` holds for use after training.

    Attributes:
        config: the experiment that was trained.
        categories: label k is `categories[k]`.
        weights: of the detector (the averaged ones where training kept an average).
        calibration: what `python -m dyndet.calibrate` measured, see `dyndet.speeds.set.Calibration`; None before.
    """

    config: DictConfig
    categories: list[Category]
    weights: dict[str, Tensor]
    calibration: dict[str, Any] | None = None


def read_checkpoint(path: str | Path, *, key: str = "ckpt", trust: bool = False) -> Checkpoint:
    """Reads a checkpoint.

    Args:
        path: the file.
        key: what sets it, for messages.
        trust: let its configuration name any code, which runs when the detector or the data are built.

    Raises:
        UserError: if the file is missing, damaged, not ours, or holds anything but plain data; if its configuration
            names more than dyndet's parts and is not trusted, see `dyndet.checkpoints.trusted`.
    """
    content = _content(Path(path), key)
    extra = content["dyndet"]
    stored, categories = _described(path, extra)
    if isinstance(stored, dict) and isinstance(stored.get("backbone"), dict) and "weights" in stored["backbone"]:
        stored["backbone"]["weights"] = "none"  # those of a file are in it
    try:
        config = DictConfig(stored)
    except OmegaConfBaseException as error:
        raise UserError(f"{path} holds a damaged configuration: {reason(error)}") from error
    if trust is not True:  # trust=no is a word, and true
        check_stored(config, source=path)
    prefix = "detector."
    weights = {k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)}
    return Checkpoint(config, categories, weights, extra.get("calibration"))


def _described(path: str | Path, extra: Any) -> tuple[Any, list[Category]]:
    """Configuration, with the names of today, and categories of a checkpoint.

    Raises:
        UserError: if it has none, or they are too many values, or none.
    """
    try:
        stored = extra["config"]
        if _size(stored, {}) > _MOST_VALUES:
            raise UserError(f"{path} holds a configuration of more than {_MOST_VALUES} values")
        return _modernised(stored), [Category(item["id"], item["name"]) for item in extra["categories"]]
    except (RecursionError, LookupError, TypeError) as error:
        raise UserError(f"{path} holds a damaged configuration: {reason(error)}") from error


def take_weights(detector: nn.Module, weights: dict[str, Tensor], *, strict: bool = True) -> Any:
    """`load_state_dict` without the towers that nobody reads: earlier detectors had them, see `Predictor.reads`."""
    known = detector.state_dict().keys()
    idle = re.compile(r"(?:.+\.)?head\.(?:towers\.)?reg\..+")
    fitting = {name: value for name, value in weights.items() if name in known or not idle.fullmatch(name)}
    return detector.load_state_dict(fitting, strict=strict)


def _size(node: Any, known: dict[int, int]) -> int:
    """How many values a configuration has when parts that it shares are written out."""
    parts = node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ()
    if id(node) not in known:
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def _modernised(node: Any) -> Any:
    """Plain containers in which parts and keys that were called otherwise once have their names of today."""
    if isinstance(node, list):
        return [_modernised(item) for item in node]
    if isinstance(node, str):
        return re.sub(r"(?<=\$\{)[\w.]+(?=\})", lambda link: replacement(link[0]) or link[0], node)
    if not isinstance(node, dict):
        return node
    target, result = node.get("_target_"), {}
    for key, value in node.items():
        argument = replacement(f"{target}.{key}") if isinstance(target, str) else None
        result[argument.rpartition(".")[2] if argument else key] = _modernised(value)
    if isinstance(target, str):
        result["_target_"] = replacement(target) or target
    if target == _OLD_BACKBONE and isinstance(node.get("frozen_stages"), int):  # it counted the stem as well
        result["frozen_stages"] = max(node["frozen_stages"], 0) - 1
    return result


def write_calibration(path: str | Path, calibration: dict[str, Any], out: str | Path | None = None) -> Path:
    """Puts a calibration into a checkpoint, everything else as it is, and returns the file.

    Args:
        path: the checkpoint.
        calibration: plain containers.
        out: where to write; over `path` when None.
    """
    content = _content(Path(path))
    content["dyndet"]["calibration"] = calibration
    target = Path(out or path)
    write_sealed(content, target)
    return target


def _content(path: Path, key: str = "ckpt") -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no checkpoint at {path.resolve()}: set {key} to a file such as RUN/checkpoints/last.ckpt")
    content = read_sealed(path, key=key)
    if not isinstance(content, dict) or "dyndet" not in content or "state_dict" not in content:
        raise UserError(
            f"{path} was not written by dyndet.train; a released one first goes through python -m dyndet.convert"
        )
    return content


def resume_path(config: DictConfig, say: Callable[[str], object] = print) -> str | None:
    """The checkpoint that `ckpt_path` means: a file, "last" (the newest good one of the newest run), or none.

    Args:
        config: of the run that goes on.
        say: told which newer ones are damaged.

    Raises:
        UserError: if there is nothing to resume from, or the file is no checkpoint.
    """
    path = config.ckpt_path
    if path is None:
        return None
    if path == "last":
        name = f"{config.name}{config.step}"
        path, skipped = latest_checkpoint(name)
        lost = "; ".join(f"{file}: {fault}" for file, fault in skipped)
        if path is None:
            none = f"has a good one ({lost})" if lost else f"has a checkpoint under {Path('outputs').resolve()}"
            raise UserError(f"ckpt_path=last: no run of {name!r} {none}")
        if lost:
            say(f"ckpt_path=last: goes on from {path}; damaged ones were skipped ({lost})")
    if not Path(path).is_file():
        raise UserError(f"ckpt_path={path}: no such file; give a checkpoint or 'last'")
    if "optimizer_states" not in _content(Path(path), "ckpt_path"):
        raise UserError(f"ckpt_path={path} holds no run to go on with: init={path} starts one from its weights")
    return str(path)


def check_resumable(path: str, module: nn.Module, categories: Sequence[Category], config: DictConfig) -> str:
    """Whether a run can go on from a checkpoint; what is set otherwise than in it, in one line.

    Args:
        path: the checkpoint.
        module: that takes its tensors.
        categories: of the data.
        config: of the run that goes on.

    Raises:
        UserError: if its tensors are of another detector, its categories are others, or its optimizer is another kind.
    """
    content = _content(Path(path), "ckpt_path")
    extra: dict[str, Any] = content["dyndet"]
    if "router_loss" in config and "offset" not in extra:
        raise UserError("ckpt_path is not a checkpoint of step 2; those of step 1 are given as init=...")
    stored, known = _described(path, extra)
    check_categories(path, known, categories)
    saved: dict[str, Tensor] = content["state_dict"]
    expected = module.state_dict()
    odd = sorted(saved.keys() ^ expected.keys())
    odd += [name for name in saved.keys() & expected.keys() if saved[name].shape != expected[name].shape]
    if odd:
        same = all("backbone" not in name.split(".") for name in odd)
        raise UserError(
            f"ckpt_path={path} is of another detector than this experiment: {len(odd)} tensors do not fit, such as "
            f"{odd[0]}. A run goes on with the command that started it"
            + (f"; init={path} takes what fits into a new one" if same else "")
        )
    return check_changes(path, stored, config) if stored else ""
