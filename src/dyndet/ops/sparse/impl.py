"""How a sparse operation is executed, and where which execution is the faster one."""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

import torch

from dyndet.ops.sparse.execute import triton

Impl = Literal["auto", "dense", "gather", "triton"]
"""dense: everything, then the active part is kept (the reference). gather: rows by index and one matrix product per
chunk, in plain torch. triton: the kernels of `dyndet.kernels`. auto: the fastest of them on this device."""

IMPLS: tuple[Impl, ...] = ("auto", "dense", "gather", "triton")


@runtime_checkable
class SwitchableHead(Protocol):
    """A head whose sparse operations can be executed in several ways, which compute the same."""

    def execute(self, impl: Impl) -> Impl:
        """Sets the execution and returns the one before."""
        ...


# Share of active positions at which a dense 3x3 convolution becomes the faster one, from so many channels on
# (docs/kernels.md, measured by scripts/bench_sparse.py). CUDA: not yet measured; the hint must exceed a cautious bound.
_FLOAT32 = {0: 0.3, 64: 0.55, 128: 0.65}
# Units for products of bfloat16 speed the products up, but not the gathering.
_BFLOAT16 = {0: 0.15, 64: 0.25, 128: 0.35, 256: 0.55} if torch.cpu.get_capabilities().get("amx_bf16") else {0: 0.6}
_CROSSOVER = {
    ("cpu", torch.float32): _FLOAT32,
    ("cpu", torch.bfloat16): _BFLOAT16,
    ("cuda", torch.float32): {0: 0.45},
    ("cuda", torch.bfloat16): {0: 0.45},
    ("cuda", torch.float16): {0: 0.45},
}
_OTHERWISE = {0: 0.5}


def check_impl(impl: str) -> None:
    """Raises ValueError on an unknown execution."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be {', '.join(IMPLS[:-1])} or {IMPLS[-1]}, got {impl!r}")


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
    return "triton" if triton.serves(device) else "gather"


def crossover(channels: int, dtype: torch.dtype, device: torch.device) -> float:
    """The share of active positions from which "auto" convolves densely."""
    table = _CROSSOVER.get((device.type, dtype), _OTHERWISE)
    return table[max(least for least in table if least <= channels)]
