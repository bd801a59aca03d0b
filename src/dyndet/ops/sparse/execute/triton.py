"""The one door to the Triton kernels, which not every platform has."""

from __future__ import annotations

import os
from importlib.util import find_spec
from types import ModuleType

import torch

from dyndet.errors import UserError

_INSTALLED = find_spec("triton") is not None


def serves(device: torch.device) -> bool:
    """Whether the kernels are the execution of choice on this device."""
    return _INSTALLED and device.type == "cuda" and torch.version.hip is None


def chosen(impl: str, device: torch.device) -> bool:
    """Whether `impl` means the kernels on this device.

    Raises:
        UserError: where they were asked for and cannot run.
    """
    if impl == "auto":
        return serves(device)
    if impl != "triton":
        return False
    interpreting = _INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"
    if not (interpreting or serves(device) or device.type == "meta"):
        why = f"features are on {device.type}" if _INSTALLED else "the package triton is not installed"
        raise UserError(f"impl=triton needs a CUDA device and Triton; {why}: use impl=auto or gather")
    return device.type != "meta"


def kernels() -> ModuleType:
    """`dyndet.kernels`, imported when first needed."""
    import dyndet.kernels  # pyright: ignore[reportMissingImports]  # lies outside src

    return dyndet.kernels
