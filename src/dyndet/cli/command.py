"""The skeleton of every command: compose, run, and report mistakes in one line."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import hydra
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from dyndet.cli.compose import check_choices, config_source, explain
from dyndet.cli.configured import about_a_value, check_ranges
from dyndet.cli.folders import run_folder
from dyndet.cli.jobs import run_job
from dyndet.cli.quoting import (
    added_or_set,
    check_single,
    check_words,
    expand_home,
    flags_and_overrides,
    raw,
    read_paths,
)
from dyndet.cli.renamed import current
from dyndet.cli.usage import command_help
from dyndet.disk import BROKEN, FULL, about_the_disk
from dyndet.errors import LostProcessError, UserError
from dyndet.signals import Interrupted, end_workers, listening, received, stop

_HARMLESS = (
    ".*does not have many workers.*",
    ".*isinstance.treespec, LeafSpec.*",  # Lightning with the newest torch
    ".*dataloader is not resumable.*",  # it is: see data/sampler.py
    ".*module.s. in eval mode at the start of training.*",  # frozen parts
    ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run goes on in its own folder
    "Image size .* could be decompression bomb.*",  # data/images.py has a lower limit
    ".*recommended to use .self.log.*sync_dist=True.*",  # what is logged of a validation has been gathered
    # Hydra 1.4 of what goes in 1.5, which pyproject.toml leaves out: 1.3 has nothing else.
    ".*register_new_resolver.. is deprecated.*",
    "The version_base parameter is deprecated.*",
    "hydra.utils.instantiate.. resolved _target_='dyndet.cli.folders.*",
)
_VERBOSE = "DYNDET_FULL_ERROR"
_OF_SWEEPS = ("hydra.sweep", "hydra.mode", "hydra.launcher", "hydra.sweeper", "hydra/launcher", "hydra/sweeper")


def run(task: Callable[[DictConfig], object], config_name: str) -> None:
    """Runs a task on the configuration that the command line describes; exits with 2 on a user's mistake.

    Set HYDRA_FULL_ERROR=1 to see the whole traceback of such a mistake.
    """
    try:
        with listening():
            _run(task, config_name)
            if (name := received()) is not None:  # somebody has swallowed the exception
                stop(name)
    except Interrupted as interrupted:
        if not interrupted.told:
            print(f"interrupted by {interrupted.name}", file=sys.stderr)
        _end_processes(ask=True)
        end_workers()
        raise


def _run(task: Callable[[DictConfig], object], config_name: str) -> None:
    if (text := command_help(config_name, sys.argv[1:])) is not None:
        print(text)
        return
    if config_name in ("train", "doctor"):
        sys.argv[1:], notes = current(sys.argv[1:])
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    try:
        check_words(sys.argv[1:])
    except UserError as error:
        _fail(str(error))
    for harmless in _HARMLESS:
        warnings.filterwarnings("ignore", message=harmless)
    flags, overrides = flags_and_overrides(sys.argv[1:])
    overrides = [added_or_set(item) for item in overrides]
    sys.argv[1:], changed = read_paths([*overrides, *flags])  # --info would take an override for its value
    OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)
    # What the user wants: processes that join a run inherit both.
    verbose = os.environ.setdefault(_VERBOSE, os.environ.get("HYDRA_FULL_ERROR", "")) == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # lets exceptions through to the handler below
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)
    logging.raiseExceptions = False  # a log on a full disk is lost without a traceback for every line

    def answer(error: Exception) -> str | None:
        """An exception in one line; None where its traceback is to be seen."""
        text = None if verbose else _one_line(error, config_name)
        return None if text is None else text + _how_read(text, changed)

    @functools.wraps(task)
    def checked(config: DictConfig) -> object:
        expand_home(config)
        check_single(config)
        _require_all(config)
        check_ranges(config)
        check_choices(config, raw(HydraConfig.get().overrides.task))
        return task(config)

    @functools.wraps(task)
    def job(config: DictConfig) -> object:
        running = HydraConfig.get()
        if running.mode == RunMode.MULTIRUN:
            with _standing_alone(running):
                folder, sweep = Path(running.runtime.output_dir), Path(running.runtime.cwd, running.sweep.dir)
                return run_job(checked, config, folder, sweep, raw(running.overrides.task), answer)
        try:
            return checked(config)
        except Exception as error:  # here, because Hydra would announce it with a line of its own
            if (text := answer(error)) is None:
                raise
            if isinstance(error, LostProcessError):  # to close what is shared with it would wait for it
                sys.stdout.flush()
                print(f"error: {text}", file=sys.stderr, flush=True)
                end_workers()
                os._exit(2)
            return _fail(text)

    try:
        hydra.main(version_base="1.3", config_path=config_source(config_name), config_name=config_name)(job)()
    except (HydraException, OmegaConfBaseException) as error:
        if verbose:
            raise
        _fail(explain(error, sys.argv[1:], config_name))
    except OSError as error:
        if verbose or (error.filename is None and error.errno not in FULL | BROKEN):
            raise
        _fail(f"{error.filename or 'a file of this command'}: {error.strerror}")


def _one_line(error: Exception, command: str) -> str | None:
    if isinstance(error, UserError):
        # A loader's process sends its error as a traceback that ends with the message.
        text = str(error).rpartition(f"{type(error).__name__}: ")[2]
    elif isinstance(error, OmegaConfBaseException):
        text = explain(error, sys.argv[1:], command)
    elif isinstance(error, OSError) and error.errno in FULL:
        text = about_the_disk(error, Path(error.filename) if error.filename else None)
    elif (text := about_a_value(error)) is None:
        return None
    return " ".join(text.split())


def _how_read(message: str, changed: Mapping[str, str]) -> str:
    """What was made of the arguments that a message may be about, if not what they say."""
    about = [
        f"{old} was read as the quoted text {new}"
        for old, new in changed.items()
        if new.partition("=")[0] in message or new.partition("=")[2].strip("'\"") in message
    ]
    return f" ({'; '.join(about)})" if about else ""


def _require_all(config: DictConfig) -> None:
    missing = sorted(OmegaConf.missing_keys(config), key=lambda key: key.count("."))
    if missing:
        raise UserError(f"{missing[0]} must be given: add {missing[0]}=... to the command")


@contextmanager
def _standing_alone(running: Any) -> Iterator[None]:
    """Keeps a sweep's jobs apart: further processes of a job run this job alone, and none outlives it."""
    arguments = sys.argv[1:]
    flags = [flag for flag in flags_and_overrides(arguments)[0] if flag not in ("-m", "--multirun")]
    hydras = [item for item in raw(running.overrides.hydra) if not item.lstrip("+").startswith(_OF_SWEEPS)]
    sys.argv[1:] = [*hydras, *raw(running.overrides.task), *flags]
    with read_write(running):
        running.run.dir = running.runtime.output_dir
    environment = dict(os.environ)
    try:
        yield
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        _end_processes()
        os.environ.clear()  # ranks and addresses of the job's processes
        os.environ.update(environment)
        sys.argv[1:] = arguments


def _end_processes(*, ask: bool = False) -> None:
    """Those that joined a job: where it failed, Lightning's watch over them would end this process with them.

    Args:
        ask: let those that still run know that it is over.
    """
    for watch in threading.enumerate():
        if type(watch).__name__ == "_ChildProcessObserver":
            watched, watch._child_processes = getattr(watch, "_child_processes", []), []  # pyright: ignore
            for process in watched:
                if ask:
                    process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=60)
                process.kill()  # if it hangs


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
