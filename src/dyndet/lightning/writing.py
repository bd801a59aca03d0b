"""Files of a run on a disk that does not take them: the run ends with one line, or goes on with a warning."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from omegaconf import DictConfig, OmegaConf

from dyndet.cli.compose import build
from dyndet.cli.latest import LAST, PREVIOUS
from dyndet.disk import FAULTS, FULL, about_the_disk
from dyndet.errors import UserError, WriteError
from dyndet.lightning.own_files import is_checkpoint
from dyndet.sealed import fault, read_sealed, write_sealed

_LOGGING = ("log_hyperparams", "log_metrics", "save", "after_save_checkpoint", "finalize")


class WritePolicy:
    """What becomes of a run when a file of it cannot be written.

    Args:
        on_write_error: "stop" ends it; "go_on" warns, trains on and tries again at the next save.
    """

    def __init__(self, on_write_error: str = "stop") -> None:
        if on_write_error not in ("stop", "go_on"):
            raise UserError(f"on_write_error={on_write_error}: stop or go_on")
        self.goes_on = on_write_error == "go_on"

    @contextmanager
    def __call__(self, path: str | Path) -> Iterator[None]:
        """Around what writes a file, or files in a folder.

        Raises:
            WriteError: where the run is to stop.
        """
        try:
            yield
        except (OSError, WriteError) as error:
            if isinstance(error, OSError) and error.errno not in FAULTS:
                raise
            line = str(error) if isinstance(error, WriteError) else about_the_disk(error, Path(path))
            if not self.goes_on:
                advice = "on_write_error=go_on would train on and try again at the next save"
                raise WriteError(f"{line}. Then go on with ckpt_path=last; {advice}") from error
            rank_zero_warn(f"{line}. The run goes on (on_write_error=go_on)")


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's reading and writing of checkpoints with files that are never torn, see `dyndet.sealed`. Of a run's
    last checkpoint the one before is kept beside it.

    Args:
        policy: where a file cannot be written.

    Attributes:
        lost: files whose latest save failed.
    """

    def __init__(self, policy: WritePolicy | None = None) -> None:
        self.policy = WritePolicy() if policy is None else policy
        self.lost: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        if _elsewhere(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        file = Path(path)
        self.lost.add(file)
        with self.policy(file):
            write_checkpoint(checkpoint, file)
            self.lost.discard(file)
        return None

    def load_checkpoint(
        self,
        path: _PATH,
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Never more than tensors and plain values of a local file, whatever is asked for."""
        if _elsewhere(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        return read_sealed(path, key="ckpt_path")

    def remove_checkpoint(self, path: _PATH) -> None:
        """A file, never a folder: the name may come from a checkpoint."""
        if _elsewhere(path):
            super().remove_checkpoint(path)
        elif is_checkpoint(path):
            Path(path).unlink(missing_ok=True)


def write_checkpoint(content: dict[str, Any], file: Path) -> None:
    """Writes a checkpoint of a run; the one before a run's last goes to `PREVIOUS`, and is given up for room.

    Raises:
        WriteError: if the disk does not take it.
    """
    previous = file.with_name(PREVIOUS)
    kept = previous if file.name == LAST else None
    try:
        write_sealed(content, file, previous=kept)
    except WriteError as error:
        full = isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL
        if not (full and previous.is_file() and fault(file.with_name(LAST)) is None):
            raise
        previous.unlink()
        write_sealed(content, file, previous=kept)


def with_checkpoint_files(trainer: DictConfig, policy: WritePolicy) -> list[Any]:
    """The plugins of Lightning's trainer and `CheckpointFiles`, unless what writes checkpoints is among them.

    Args:
        trainer: its configuration.
        policy: of `CheckpointFiles`.
    """
    chosen = trainer.get("plugins")
    chosen = build(chosen) if OmegaConf.is_config(chosen) else chosen
    plugins = list(chosen) if isinstance(chosen, Sequence) and not isinstance(chosen, str) else [chosen]
    plugins = [plugin for plugin in plugins if plugin is not None]
    strategy = trainer.get("strategy")
    own = OmegaConf.is_dict(strategy) and strategy.get("checkpoint_io") is not None
    if own or any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        return plugins
    return [*plugins, CheckpointFiles(policy)]


def writing(trainer: Trainer, path: str | Path) -> AbstractContextManager[None]:
    """Around what a callback writes in a run: its policy."""
    files = trainer.strategy.checkpoint_io
    return files.policy(path) if isinstance(files, CheckpointFiles) else nullcontext()


def lost(trainer: Trainer, file: str | Path) -> bool:
    """Whether the latest save of a checkpoint failed; the same on every process."""
    files = trainer.strategy.checkpoint_io
    failed = isinstance(files, CheckpointFiles) and Path(file) in files.lost
    return bool(trainer.strategy.broadcast(failed))


def keep_logging(logger: Logger, policy: WritePolicy) -> None:
    """Makes a logger follow the policy where the disk does not take what it writes.

    Args:
        logger: changed in place.
        policy: of the run.
    """
    for name in _LOGGING:
        setattr(logger, name, _guarded(getattr(logger, name), logger, policy))


def _guarded(method: Callable[..., Any], logger: Logger, policy: WritePolicy) -> Callable[..., Any]:
    @functools.wraps(method)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        with policy(logger.save_dir or "."):
            return method(*args, **kwargs)

    return guarded


def _elsewhere(path: _PATH) -> bool:
    """Whether it lies where a file system of Python does not reach: s3://, gs://."""
    return "://" in str(path)
