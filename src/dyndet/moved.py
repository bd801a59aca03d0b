"""Modules that lay elsewhere once: importing an old place gives the new one, with a DeprecationWarning naming it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast

MOVED: dict[str, str] = {
    "dyndet.arguments": "dyndet.cli.arguments",
    "dyndet.checkpoint": "dyndet.checkpoints.read",
    "dyndet.cli.source": "dyndet.cli.config_source",
    "dyndet.command": "dyndet.cli.command",
    "dyndet.config": "dyndet.cli.compose",
    "dyndet.convert.coco": "dyndet.convert.coco_categories",
    "dyndet.convert.read": "dyndet.convert.source",
    "dyndet.convert.transforms": "dyndet.convert.tensor_transforms",
    "dyndet.device": "dyndet.cli.device",
    "dyndet.initial": "dyndet.checkpoints.start_from",
    "dyndet.lightning.budget": "dyndet.lightning.budget_warmup",
    "dyndet.lightning.router": "dyndet.lightning.router_module",
    "dyndet.metrics.coco": "dyndet.metrics.average_precision",
    "dyndet.metrics.curve": "dyndet.speeds.splits",
    "dyndet.metrics.timing": "dyndet.speeds.timing",
    "dyndet.models.backbone": "dyndet.models.backbones.timm",
    "dyndet.models.cascade": "dyndet.models.dynamicdet",
    "dyndet.models.deformable": "dyndet.models.backbones.deformable",
    "dyndet.models.detectors.cascade": "dyndet.models.detectors.dynamic",
    "dyndet.models.heads.density": "dyndet.models.heads.expected_density",
    "dyndet.models.predictors.assign": "dyndet.models.predictors.fcos_assign",
    "dyndet.models.predictors.yolo": "dyndet.models.predictors.yolo_predictor",
    "dyndet.models.stages": "dyndet.models.backbones.stages",
    "dyndet.models.swin": "dyndet.models.backbones.swin",
    "dyndet.models.two_stage.cascade": "dyndet.models.two_stage.cascade_rcnn",
    "dyndet.models.weights": "dyndet.models.backbones.weights",
    "dyndet.models.yolo": "dyndet.models.backbones",
    "dyndet.models.yolo.backbone": "dyndet.models.backbones.yolov7",
    "dyndet.models.yolo.blocks": "dyndet.models.backbones.yolov7_blocks",
    "dyndet.models.yolo.neck": "dyndet.models.necks.yolov7_pan",
    "dyndet.report.curve": "dyndet.speeds.plot",
    "dyndet.report.gates": "dyndet.report.gate_maps",
    "dyndet.speed": "dyndet.speeds.set",
    "dyndet.step2": "dyndet.lightning.step2",
    "dyndet.trusted": "dyndet.checkpoints.trusted",
}
"""From old to new places; what lies in a package moves with it."""


def new_place(module: str) -> str | None:
    """Where a module lies now that lay elsewhere once."""
    parts = module.split(".")
    for end in range(len(parts), 1, -1):
        new = MOVED.get(".".join(parts[:end]))
        if new is not None:
            return ".".join([new, *parts[end:]])
    return None


class OldPlaces:
    """Finder and loader, last in `sys.meta_path`: asked only for what nobody else finds, it costs nothing."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        new = new_place(fullname) if fullname.startswith("dyndet.") else None
        if new is None:
            return None
        warnings.warn(f"{fullname} is now {new}", DeprecationWarning, stacklevel=2)
        # A package with nothing on its path, so that its parts are asked for here, too. No subclasses of importlib.abc:
        # importing that takes longer than all the rest.
        return ModuleSpec(fullname, cast(Any, self), is_package=True)

    def create_module(self, spec: ModuleSpec) -> None:
        """None: an ordinary, empty module."""

    def exec_module(self, module: ModuleType) -> None:
        """Puts the module itself in the place of the empty one, so that there is one of each class."""
        name = module.__name__
        real = import_module(str(new_place(name)))
        if hasattr(real, "__path__"):  # not a package, in which old names would be looked for before they get here
            module.__dict__.update({key: value for key, value in vars(real).items() if not key.startswith("__")})
        else:
            sys.modules[name] = real


def install() -> None:
    """Lets old places be imported."""
    if not any(isinstance(finder, OldPlaces) for finder in sys.meta_path):
        sys.meta_path.append(OldPlaces())
