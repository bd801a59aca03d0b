"""Step 2 of a dynamic detector: what `python -m dyndet.train` puts together when the experiment has a `router_loss`."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_method
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig, OmegaConf

from dyndet.checkpoints.read import read_checkpoint, take_weights
from dyndet.cli.compose import build
from dyndet.data.datamodule import DetectionDataModule
from dyndet.errors import UserError
from dyndet.lightning.content_key import content_key
from dyndet.lightning.lesson_files import about_kept
from dyndet.lightning.lessons import LessonDataModule, Lessons, collect
from dyndet.lightning.router_module import RouterModule
from dyndet.models.detectors.dynamic import DynamicDetector
from dyndet.models.dynamicdet.offset import make_offset

_LOADING = (
    "num_workers", "pin_memory", "group_by_aspect", "drop_last", "max_val", "hint", "on_error", "max_errors", "timeout",
)  # fmt: skip


def router_parts(config: DictConfig, data: DetectionDataModule) -> tuple[RouterModule, DetectionDataModule]:
    """The module that trains the router of `config.init`, and the data that it learns from.

    Args:
        config: of an experiment with `+router=...`.
        data: its images, set up for fitting.

    Raises:
        UserError: if the checkpoint does not hold this dynamic detector, or the experiment has none.
    """
    _check_order()
    if config.init is None:
        raise UserError("init must be given: add init=RUN/checkpoints/last.ckpt of step 1 to the command")
    if "router" not in inspect.signature(get_method(config.detector._target_)).parameters:
        raise UserError("only a dynamic detector has a router to train: choose an experiment with detector=dynamic")
    if "weights" in config.backbone:
        config.backbone.weights = "none"  # they come from the checkpoint
    detector: DynamicDetector = build(config.detector)
    load_detectors(detector, config.init, data, trust=config.trust)
    lessons = None
    if config.router.cached:
        device = _own_device(config.trainer.accelerator, config.trainer.devices)
        folder = Path(config.router.cache) / _fingerprint(config, data)
        rank_zero_info(f"lessons: of {len(data.train)} training images, in {folder} ({about_kept(folder)})")
        lessons = collect(detector, data, passes=config.router.passes, device=device, folder=folder)
        data = _lesson_data(config, Lessons(lessons, data.categories))
    loss = config.router_loss
    try:
        offset = make_offset(
            loss.offset,
            weight=loss.weight,
            differences=None if lessons is None else lessons.losses[0] - lessons.losses[1],
        )
    except ValueError as error:
        raise UserError(f"router_loss: {error}") from error
    module = RouterModule(
        detector,
        offset=offset,
        categories=data.categories,
        optimizer=build(config.optim.optimizer),
        schedule=build(config.optim.schedule),
        config=cast(dict[str, Any], OmegaConf.to_container(config)),
    )
    return module, data


def _check_order() -> None:
    if not HydraConfig.initialized():
        return
    groups = [item.lstrip("+").partition("=")[0] for item in HydraConfig.get().overrides.task]
    if {"experiment", "router"} <= set(groups) and groups.index("experiment") > groups.index("router"):
        raise UserError(
            "write +router=... after +experiment=...: what comes later wins, and step 2 has its own settings"
        )


def load_detectors(detector: DynamicDetector, init: str, data: DetectionDataModule, *, trust: bool = False) -> None:
    """Takes everything but the router from a checkpoint of step 1.

    Raises:
        UserError: if there is none, or it is of something else.
    """
    saved = read_checkpoint(init, key="init", trust=trust)
    if saved.categories != data.categories:
        raise UserError(f"init={init} was trained on other categories than those of the data: {saved.categories}")
    weights = {name: value for name, value in saved.weights.items() if not name.startswith("router.")}
    try:
        result = take_weights(detector, weights, strict=False)
    except RuntimeError as error:
        raise UserError(f"init={init} is of another dynamic detector: {str(error).splitlines()[1].strip()}") from error
    missing = [name for name in result.missing_keys if not name.startswith("router.")]
    if missing or result.unexpected_keys:
        odd = [*missing, *result.unexpected_keys]
        raise UserError(
            f"init={init} is of another detector than experiment {config_name(saved.config)}: {len(odd)} tensors do "
            f"not fit, such as {odd[0]}"
        )


def config_name(config: DictConfig) -> str:
    return str(config.get("name", "?"))


def _own_device(accelerator: str, devices: int | str | Sequence[int]) -> torch.device:
    """Where this process computes before the trainer has started: torchrun and SLURM number their processes."""
    if accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    mine = range(torch.cuda.device_count()) if isinstance(devices, int | str) else list(devices)
    return torch.device("cuda", mine[rank % len(mine)])


def _fingerprint(config: DictConfig, images: DetectionDataModule) -> str:
    """Names what lessons depend on, the content of the training set included: not how it is loaded, not validation,
    not the router.
    """
    data: Any = OmegaConf.to_container(config.data.module, resolve=True)
    data = {key: value for key, value in data.items() if not key.startswith("val") and key not in _LOADING}
    if isinstance(data.get("folder"), dict):  # which images train, their content says
        data["folder"] = {
            key: value for key, value in data["folder"].items() if not key.startswith("val") and key not in _LOADING
        }
    detector: Any = OmegaConf.to_container(config.detector, resolve=True)
    detector = {key: value for key, value in detector.items() if key != "router"}
    digest = hashlib.blake2b(digest_size=8)
    digest.update(repr((data, detector, content_key(images.train), config.seed, config.router.passes)).encode())
    with Path(config.init).open("rb") as file:
        for block in iter(lambda: file.read(1 << 22), b""):
            digest.update(block)
    return digest.hexdigest()


def _lesson_data(config: DictConfig, lessons: Lessons) -> DetectionDataModule:
    """The data module of the experiment with lessons for training."""
    module = OmegaConf.create(OmegaConf.to_container(config.data.module, resolve=True))
    module._target_ = f"{LessonDataModule.__module__}.{LessonDataModule.__name__}"
    module._partial_ = True
    data: DetectionDataModule = build(
        module,
        train=lessons,
        train_mix=None,
        train_transform=None,
        batch_size=config.router.batch_size,
        val_batch_size=config.data.module.get("val_batch_size") or config.data.module.batch_size,
        group_by_aspect=False,
        drop_last=False,
        max_train=None,
    )
    data.setup("fit")
    return data
