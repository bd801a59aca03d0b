"""The newest checkpoint of a name that is whole."""

from __future__ import annotations

import glob
from pathlib import Path

from dyndet.errors import UserError
from dyndet.sealed import fault, read_sealed

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
_NAMES = (LAST, PREVIOUS, "best.ckpt")


def latest_checkpoint(name: str, root: str = "outputs") -> tuple[Path | None, list[tuple[Path, str]]]:
    """The checkpoint to go on from: the last of the newest run of an experiment, or where it is damaged the one of most
    steps among the others of that run, or where all are that of an older run.

    Returns:
        the file, None where there is none, and the newer ones that were skipped, each with what is wrong with it.
    """
    found = Path(root).glob(f"{glob.escape(name)}/*/checkpoints/*.ckpt")
    folders = {file.parent for file in found if file.name in _NAMES and file.is_file()}
    skipped: list[tuple[Path, str]] = []
    for folder in sorted(folders, key=_time, reverse=True):
        good: dict[Path, int] = {}
        for file in _checkpoints(folder):
            wrong, step = fault(file), step_of(file)
            if wrong is None and step >= 0:
                good[file] = step
                if file.name == LAST:
                    break
            else:
                skipped.append((file, wrong or "it is no checkpoint of a run"))
        if good:
            return max(good, key=lambda file: good[file]), skipped
    return None, skipped


def step_of(file: Path) -> int:
    """How far a checkpoint is, -1 where the file is none."""
    try:
        content = read_sealed(file, mmap=True)
    except UserError:
        return -1
    step = content.get("global_step") if isinstance(content, dict) else None
    return step if isinstance(step, int) else -1


def _checkpoints(folder: Path) -> list[Path]:
    return [folder / name for name in _NAMES if (folder / name).is_file()]


def _time(folder: Path) -> float:
    """Of the last checkpoint: others may have been calibrated since."""
    return _checkpoints(folder)[0].stat().st_mtime
