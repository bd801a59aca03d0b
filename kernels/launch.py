"""Starting kernels: on a GPU, in the Triton interpreter, or on paper.

The same launchers run in three ways: compiled on a GPU; interpreted on the CPU (TRITON_INTERPRET=1, for tests); or
recorded with meta tensors, which gives every launch with its exact constants so that it can be compiled for an
architecture that is not there. Recording also proves that a launcher never looks at values: a meta tensor has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs

INTERPRETED: bool = knobs.runtime.interpret

# The interpreter computes bfloat16 on raw bits and raises nothing: operands must be widened before any arithmetic.
UPCAST = tl.constexpr(INTERPRETED)

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Target:
    """What a launcher must know of a device: compute capability (90 for 9.0) and number of multiprocessors."""

    capability: int
    multiprocessors: int


@dataclass(frozen=True)
class Launch:
    """One recorded kernel start; `arguments` by position, `options` hold constants, warps and stages by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class _Recording:
    target: Target
    launches: list[Launch]


_recording: ContextVar[_Recording | None] = ContextVar("recording", default=None)


@contextmanager
def recorded(target: Target) -> Iterator[list[Launch]]:
    """Collect launches, as chosen for `target`, instead of running them; launchers take meta tensors inside."""
    recording = _Recording(target, [])
    token = _recording.set(recording)
    try:
        yield recording.launches
    finally:
        _recording.reset(token)


def target(device: torch.device) -> Target:
    """The target that launches on `device` are tuned for."""
    recording = _recording.get()
    return recording.target if recording is not None else _target(device)


@cache
def _target(device: torch.device) -> Target:
    _check(device)
    if device.type != "cuda":  # interpreted: few programs, so that the persistent loops are exercised
        return Target(80, 1)
    major, minor = torch.cuda.get_device_capability(device)
    return Target(10 * major + minor, torch.cuda.get_device_properties(device).multi_processor_count)


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start a kernel on the device of its tensors.

    Args:
        kernel: a `triton.jit` function.
        grid: programs along each axis.
        arguments: of the kernel, in order; the device is that of the first tensor.
        options: constants of the kernel, `num_warps`, `num_stages`.

    Raises:
        RuntimeError: when the tensors are not on a GPU and Triton does not interpret.
    """
    recording = _recording.get()
    if recording is not None:
        recording.launches.append(Launch(kernel, grid, arguments, options))
        return
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    _check(device)
    with _current(device):
        # Explicit, because the default of Triton is about to change.
        kernel[grid](*arguments, enable_fp_fusion=True, **options)


def check_rows(rows: Tensor, channels: int | None = None, like: Tensor | None = None) -> Tensor:
    """A rows tensor as the kernels read it.

    Args:
        rows: (R+1, C); any strides, for gradients may be expanded.
        channels: the C that is expected.
        like: rows whose dtype is expected.

    Returns:
        The rows, contiguous.

    Raises:
        ValueError: on another rank, number of channels or dtype.
    """
    if rows.ndim != 2 or (channels is not None and rows.shape[1] != channels):
        raise ValueError(f"rows must be (R+1, {'C' if channels is None else channels}), got {tuple(rows.shape)}")
    if rows.dtype not in FLOATS or (like is not None and rows.dtype != like.dtype):
        wanted = "float32, float16 or bfloat16" if like is None else f"{like.dtype}"
        raise ValueError(f"rows must be {wanted}, got {rows.dtype}")
    return rows.contiguous()


def _check(device: torch.device) -> None:
    if device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(
            f"dyndet.kernels run on a GPU, the tensors are on {device}: move them, or set TRITON_INTERPRET=1 before "
            "the import to run the kernels in the (slow) Triton interpreter"
        )


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton starts kernels on the current device, whatever device its tensors are on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
