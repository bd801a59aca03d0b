"""The skeleton of every command: compose, run, and report mistakes in one line."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import hydra
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from dyndet.cli.compose import check_choices, config_source, explain
from dyndet.cli.renamed import current
from dyndet.errors import UserError

_HARMLESS = (
    ".*does not have many workers.*",
    ".*isinstance.treespec, LeafSpec.*",  # Lightning with the newest torch
    ".*dataloader is not resumable.*",  # it is: see data/sampler.py
    ".*module.s. in eval mode at the start of training.*",  # frozen parts
    ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run goes on in its own folder
)


def latest_run(name: str, root: str = "outputs") -> Path | None:
    """Folder of the newest run of an experiment that has a last checkpoint."""
    found = sorted(Path(root).glob(f"{name}/*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    return found[-1].parent.parent if found else None


def _run_folder(name: str, now: str, ckpt_path: str | None) -> str:
    """A resumed run goes on in its own folder; any other gets a new one."""
    if ckpt_path == "last":
        return str(latest_run(name) or Path("outputs", name, now))
    if ckpt_path and Path(ckpt_path).parent.name == "checkpoints":
        return str(Path(ckpt_path).parent.parent)
    return str(Path("outputs", name, now))


def run(task: Callable[[DictConfig], object], config_name: str) -> None:
    """Runs a task on the configuration that the command line describes; exits with 2 on a user's mistake.

    Set HYDRA_FULL_ERROR=1 to see the whole traceback of such a mistake.
    """
    if config_name == "train":
        sys.argv[1:], notes = current(sys.argv[1:])
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
    verbose = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # lets exceptions through to the handler below
    for harmless in _HARMLESS:
        warnings.filterwarnings("ignore", message=harmless)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)

    @functools.wraps(task)
    def job(config: DictConfig) -> object:
        try:
            _require_all(config)
            check_choices(config, HydraConfig.get().overrides.task)
            with _standing_alone():
                return task(config)
        # Caught here, because Hydra would announce it with a line of its own.
        except UserError as error:
            # A loader's process sends its error as a traceback that ends with the message.
            return _fail(str(error).rpartition(f"{type(error).__name__}: ")[2], verbose)
        except OmegaConfBaseException as error:
            return _fail(explain(error, sys.argv[1:], config_name), verbose)
        except MisconfigurationException as error:  # options of the trainer that do not go together
            return _fail(str(error), verbose)

    try:
        hydra.main(version_base="1.3", config_path=config_source(config_name), config_name=config_name)(job)()
    except (HydraException, OmegaConfBaseException) as error:
        _fail(explain(error, sys.argv[1:], config_name), verbose)


def _require_all(config: DictConfig) -> None:
    missing = sorted(OmegaConf.missing_keys(config), key=lambda key: key.count("."))
    if missing:
        raise UserError(f"{missing[0]} must be given: add {missing[0]}=... to the command")


@contextmanager
def _standing_alone() -> Iterator[None]:
    """Keeps a multirun's jobs apart: further processes of a job run this job alone, and none outlives it."""
    running: Any = HydraConfig.get()
    if running.mode != RunMode.MULTIRUN:
        yield
        return
    flags = [item for item in sys.argv[1:] if item.startswith("-") or not ("=" in item or item.startswith("~"))]
    sys.argv[1:] = [flag for flag in flags if flag not in ("-m", "--multirun")] + list(running.overrides.task)
    with read_write(running):
        running.run.dir = running.runtime.output_dir
    environment = dict(os.environ)
    try:
        yield
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        os.environ.clear()  # ranks and addresses of the job's processes
        os.environ.update(environment)


def _fail(message: str, verbose: bool) -> NoReturn:
    if verbose:
        raise
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
