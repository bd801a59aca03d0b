"""Files that a checkpoint's states of callbacks name: Lightning removes them when it saves, whatever they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

_PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")


def keep_own_files(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Leaves in a checkpoint no more names of files than those of checkpoints that this run writes.

    Args:
        checkpoint: changed in place, before the states of callbacks are loaded.
        trainer: of the run that goes on.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    folders = {Path(item.dirpath).resolve() for item in callbacks if getattr(item, "dirpath", None)}
    for state in checkpoint.get("callbacks", {}).values():
        if not isinstance(state, dict):
            continue
        for key in _PATHS:
            if key in state and not _is_own(state[key], folders):
                state[key] = ""
        models = state.get("best_k_models")
        if models is not None:
            known = models.items() if isinstance(models, dict) else ()
            state["best_k_models"] = {path: score for path, score in known if _is_own(path, folders)}


def is_checkpoint(path: Any) -> bool:
    """Whether this is the name of a file of this machine that may be a checkpoint: no folder, no address."""
    return (
        isinstance(path, str | Path)
        and "://" not in str(path)
        and Path(path).suffix == ".ckpt"
        and not Path(path).is_dir()
    )


def _is_own(path: Any, folders: set[Path]) -> bool:
    try:
        return is_checkpoint(path) and not Path(path).is_symlink() and Path(path).resolve().parent in folders
    except (OSError, ValueError):  # too long, or a null byte
        return False
