"""Which execution runs a sparse operation: plain torch or the Triton kernels, and where which is the faster one."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from dyndet.errors import UserError

Impl = Literal["auto", "dense", "gather", "triton"]
"""dense: everything, then the active part is kept (the reference). gather: rows by index and one matrix product per
chunk, in plain torch. triton: the kernels of `dyndet.kernels`. auto: the fastest of them on this device."""

Stats = Literal["active", "position"]
"""What a norm sees, see `Norm`."""


@runtime_checkable
class SwitchableHead(Protocol):
    """A head whose sparse operations can be executed in several ways, which compute the same."""

    def execute(self, impl: Impl) -> Impl:
        """Sets the execution and returns the one before."""
        ...


IMPLS: tuple[Impl, ...] = ("auto", "dense", "gather", "triton")

_INSTALLED = find_spec("triton") is not None

# Share of active positions at which a dense 3x3 convolution becomes the faster one, from so many channels on
# (docs/kernels.md, measured by scripts/bench_sparse.py). CUDA: not yet measured; the hint must exceed a cautious bound.
_FLOAT32 = {0: 0.3, 64: 0.55, 128: 0.65}
# Units for products of bfloat16 speed the products up, but not the gathering.
_BFLOAT16 = {0: 0.15, 64: 0.25, 128: 0.35, 256: 0.55} if torch.cpu.get_capabilities().get("amx_bf16") else {0: 0.6}
_CROSSOVER = {
    ("cpu", torch.float32): _FLOAT32,
    ("cpu", torch.bfloat16): _BFLOAT16,
}
_CUDA, _OTHERWISE = {0: 0.45}, {0: 0.5}


@cache
def backend(impl: str) -> ModuleType:
    """The module whose functions operators call: `triton_backend` for "triton", else `torch_backend`."""
    return import_module(f"dyndet.ops.sparse.{'triton' if impl == 'triton' else 'torch'}_backend")


def check_impl(impl: str) -> None:
    """Raises ValueError on an unknown execution."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be {', '.join(IMPLS[:-1])} or {IMPLS[-1]}, got {impl!r}")


def serves(device: torch.device) -> bool:
    """Whether the kernels are the execution of choice on this device."""
    return _INSTALLED and device.type == "cuda" and torch.version.hip is None


def resolve(impl: Impl, device: torch.device) -> str:
    """The execution of what is no convolution: "triton" or "torch".

    Raises:
        UserError: where the kernels were asked for and cannot run.
    """
    if impl == "auto":
        return "triton" if serves(device) else "torch"
    if impl != "triton" or device.type == "meta":
        return "torch"
    interpreting = _INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"
    if not (interpreting or serves(device)):
        why = f"features are on {device.type}" if _INSTALLED else "the package triton is not installed"
        raise UserError(f"impl=triton needs a CUDA device and Triton; {why}: use impl=auto or gather")
    return "triton"


def choose(impl: Impl, density: float | None, channels: int, dtype: torch.dtype, device: torch.device) -> Impl:
    """The execution of a convolution: "dense", "gather" or "triton".

    Args:
        impl: what was asked for; anything but "auto" is what it will be.
        density: share of active positions, measured or expected; None when nobody knows, which is taken as sparse. A
            head knows from earlier steps, see `DensityEstimate`; what is compiled or exported does not.
        channels: of the features.
        dtype: of the features.
        device: of the features.
    """
    if impl != "auto":
        return impl
    if density is not None and density >= crossover(channels, dtype, device):
        return "dense"
    return "triton" if serves(device) else "gather"


def crossover(channels: int, dtype: torch.dtype, device: torch.device) -> float:
    """The share of active positions from which "auto" convolves densely."""
    table = _CROSSOVER.get((device.type, dtype), _CUDA if device.type == "cuda" else _OTHERWISE)
    return table[max(least for least in table if least <= channels)]


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The type in which autocast would multiply `x`; its own where there is none."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):  # which knows no autocast
        return torch.get_autocast_dtype(kind)
    return x.dtype


def allows_tf32(dtype: torch.dtype) -> bool:
    """Whether torch lets convolutions of this type round float32 to TF32 for tensor cores, as it does by default.

    That is `torch.backends.cudnn.conv.fp32_precision`, which `torch.backends.cudnn.allow_tf32` sets as well: a sparse
    convolution is to have the precision of the dense one that it stands for. Read it where an operator is called, and
    hand it on as an argument: a graph that is compiled or exported then holds what was true at that time.
    """
    return dtype == torch.float32 and _convolutions_round()


@torch.compiler.assume_constant_result
def _convolutions_round() -> bool:
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # pyright: ignore[reportAttributeAccessIssue]
