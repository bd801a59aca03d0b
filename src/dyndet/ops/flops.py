"""Counting multiply-adds. 1 MAC = 1 multiply-add of a convolution (deformable ones too, without their sampling), linear
layer or matmul; norms and the like are free.

Papers' "FLOPs" columns are MACs in one of three conventions; `GIGA` and `GIBI` name the two units they use.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torchvision  # noqa: F401  # registers its operators
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dyndet.structures import Size

GIGA = 1e9
GIBI = 2.0**30
"""The unit of the published fine-grained head costs."""


class Staged(Protocol):
    """A detector that can run part by part."""

    def stages(self, pixels: Tensor, *, head: bool = True) -> Iterator[tuple[str, Callable[[], Any]]]: ...

    def to(self, device: str) -> Any: ...


def mac_counter() -> FlopCounterMode:
    """Torch's counter, which reports 2 FLOPs per MAC, taught deformable convolution (0 otherwise)."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.torchvision.deform_conv2d: _deform_conv_flops})


def _deform_conv_flops(
    inputs: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any
) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def count_macs(detector: Staged, size: Size) -> dict[str, int]:
    """Multiply-adds of a dense pass over one image, at exactly this size, with every gate open.

    Nothing is computed: the detector is copied to the meta device.

    Args:
        detector: a detector with `stages`.
        size: (H, W) of the network input in pixels; it is not padded.

    Returns:
        MACs of `backbone`, `neck`, `head`, `predictor` and their `total`.
    """
    return MacCounter(detector).count(size)


class MacCounter:
    """`count_macs` for many sizes: holds the shape of a detector as it is now, without its weights."""

    def __init__(self, detector: Staged) -> None:
        self._shell = copy.deepcopy(detector).to("meta").eval()

    def count(self, size: Size, *, head: bool = True, route: str | None = None) -> dict[str, int]:
        """As `count_macs`.

        Args:
            size: (H, W) in pixels.
            head: False leaves the head out, the slowest part to count where it is routed.
            route: of a cascade, "first" or "second" (the default).
        """
        pixels = torch.empty(1, 3, *size, device="meta")
        counts: dict[str, int] = {}
        with torch.no_grad():
            for name, run in self._shell.stages(pixels, head=head, **({} if route is None else {"route": route})):
                with mac_counter() as counter:
                    run()
                counts[name] = counts.get(name, 0) + counter.get_total_flops() // 2
        counts["total"] = sum(counts.values())
        return counts
