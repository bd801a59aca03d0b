"""Folders of runs: each run and each sweep has its own, whoever else starts in the same second."""

from __future__ import annotations

import atexit
import itertools
import os
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, read_write

from dyndet.cli.jobs import close_sweep, job_files
from dyndet.cli.latest import latest_checkpoint
from dyndet.cli.quoting import quote, raw
from dyndet.data.user_paths import user_path

_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # as Lightning looks for them


def resumed_run(name: str, ckpt_path: str | None) -> Path | None:
    """Folder of the run that `ckpt_path` goes on with; None where a new one begins."""
    if ckpt_path == "last":
        latest, _ = latest_checkpoint(name)
        return latest.parent.parent if latest else None
    if not isinstance(ckpt_path, str):  # a list is refused later
        return None
    path = user_path(ckpt_path)
    return path.parent.parent if path.parent.name == "checkpoints" and path.is_file() else None


def run_folder(name: str, now: str, ckpt_path: str | None) -> str:
    """A resumed run goes on in its own folder; any other gets a new one."""
    return str(resumed_run(name, ckpt_path) or Path("outputs", name, now))


def claim(folder: Path) -> Path:
    """Makes a folder that nobody else has, and returns it: with _2, _3, ... at its end where there is one already."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        mine = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
        try:
            mine.mkdir()
        except FileExistsError:
            continue
        return mine
    raise AssertionError("there is always a next number")


class OwnFolders(Callback):
    """Hydra's callback that claims the folder of a run or of a sweep, and closes a sweep with a table of its jobs."""

    def __init__(self) -> None:
        self._stale: dict[Path, int] = {}

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        settings = config.hydra
        if _chosen("hydra.run.dir", settings):  # by the user, or by the process that this one joins
            return
        with read_write(settings):
            rank = next((os.environ[name] for name in _RANKS if name in os.environ), "0")
            if rank != "0":  # torchrun and srun start all processes alike; the first one's folder is the run's
                settings.run.dir = tempfile.mkdtemp(prefix=f"dyndet_process_{rank}_")
                atexit.register(shutil.rmtree, settings.run.dir, ignore_errors=True)
                settings.output_subdir = None
            elif resumed_run(f"{config.get('name')}{config.get('step', '')}", config.get("ckpt_path")) is None:
                settings.run.dir = str(claim(Path(settings.run.dir)))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        with _loud():
            settings = config.hydra
            if not _chosen("hydra.sweep.dir", settings):
                folder = Path(settings.sweep.dir)
                if label := _swept_names(settings):
                    folder = folder.parents[1] / label / folder.name
                with read_write(settings):
                    settings.sweep.dir = str(claim(folder))
                    # Jobs are composed anew, where the name may be another: all lie in this folder all the same.
                    settings.overrides.hydra.append(f"hydra.sweep.dir={quote(settings.sweep.dir)}")
            self._stale = job_files(Path(settings.sweep.dir))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        with _loud():
            close_sweep(Path(config.hydra.sweep.dir), stale=self._stale, repeats=config.get("again") is False)


@contextmanager
def _loud() -> Iterator[None]:
    """Hydra makes warnings of its callbacks' errors, and goes on."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        raise SystemExit(f"error: {type(error).__name__}: {error}") from error


def _chosen(key: str, settings: DictConfig) -> bool:
    return any(item.partition("=")[0].lstrip("+") == key for item in raw(settings.overrides.hydra))


def _swept_names(settings: DictConfig) -> str | None:
    """Experiments or names that a sweep of runs goes through, "a+b"; None where it goes through other keys."""
    if settings.job.get("config_name") != "train":
        return None
    overrides = OverridesParser.create().parse_overrides(raw(settings.overrides.task))
    for key in ("name", "experiment"):
        for override in overrides:
            if override.key_or_group == key and override.is_sweep_override() and override.is_discrete_sweep():
                names = "+".join(str(item).strip("'\"") for item in override.sweep_string_iterator())
                return names if len(names) <= 100 and "/" not in names else "sweep"
    return None
