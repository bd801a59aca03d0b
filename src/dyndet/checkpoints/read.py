"""Reading checkpoints: as a detector to use, or as a run to go on with. No code of a file runs unless trusted."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, Node
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from dyndet.checkpoints.trusted import check_stored
from dyndet.cli.command import latest_run
from dyndet.cli.renamed import replacement
from dyndet.errors import UserError, reason
from dyndet.structures import Category


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
    try:
        config = DictConfig(extra["config"])
    except (OmegaConfBaseException, RecursionError) as error:
        raise UserError(f"{path} holds a damaged configuration: {reason(error)}") from error
    _modernise(config)
    if trust is not True:  # trust=no is a word, and true
        check_stored(config, source=path)
    prefix = "detector."
    weights = {k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)}
    return Checkpoint(
        config,
        [Category(item["id"], item["name"]) for item in extra["categories"]],
        weights,
        extra.get("calibration"),
    )


def _modernise(node: Any) -> None:
    """Parts that lie elsewhere since the file was written are called by their names of today."""
    for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
        value = node._get_node(key)
        if isinstance(value, DictConfig | ListConfig):
            if not (value._is_none() or value._is_missing() or value._is_interpolation()):
                _modernise(value)
        elif key == "_target_" and isinstance(value, Node):
            now = replacement(str(value._value()))
            if now is not None:
                node[key] = now


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
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    torch.save(content, part)
    part.replace(target)
    return target


def _content(path: Path, key: str = "ckpt") -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no checkpoint at {path.resolve()}: set {key} to a file such as RUN/checkpoints/last.ckpt")
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, LookupError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a checkpoint: {reason(error)}") from error
    if not isinstance(content, dict) or "dyndet" not in content or "state_dict" not in content:
        raise UserError(
            f"{path} was not written by dyndet.train; a released one first goes through python -m dyndet.convert"
        )
    return content


def resume_path(config: DictConfig) -> str | None:
    """The checkpoint that `ckpt_path` means: a file, "last" (the newest run of this experiment), or none.

    Raises:
        UserError: if there is nothing to resume from, or the file is no checkpoint.
    """
    wanted = config.ckpt_path
    if wanted is None:
        return None
    if wanted == "last":
        name = f"{config.name}{config.step}"
        run = latest_run(name)
        if run is None:
            raise UserError(f"ckpt_path=last: no run of {name!r} has a checkpoint under {Path('outputs').resolve()}")
        wanted = run / "checkpoints" / "last.ckpt"
    if not Path(wanted).is_file():
        raise UserError(f"ckpt_path={wanted}: no such file; give a checkpoint or 'last'")
    if "optimizer_states" not in _content(Path(wanted), "ckpt_path"):
        raise UserError(f"ckpt_path={wanted} holds no run to go on with: init={wanted} starts one from its weights")
    return str(wanted)


def check_resumable(path: str, module: nn.Module) -> None:
    """Whether a module can take a checkpoint's tensors.

    Raises:
        UserError: if they are of another detector.
    """
    saved: dict[str, Tensor] = _content(Path(path), "ckpt_path")["state_dict"]
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
