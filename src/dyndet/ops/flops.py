"""Counting multiply-adds. 1 MAC = 1 multiply-add of a convolution (deformable ones too, without their sampling), linear
layer or matmul; norms and the like are free.

Papers' "FLOPs" columns are MACs in one of three conventions; `GIGA` and `GIBI` name the two units they use.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
import torchvision  # noqa: F401  # registers its operators
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from dyndet.ops.sparse.backend import SwitchableHead
from dyndet.routing import Routing
from dyndet.structures import HeadOutput, ImageBatch, Size

GIGA = 1e9
GIBI = 2.0**30
"""The unit of the published fine-grained head costs."""


class Counted(Protocol):
    """A detector, see `dyndet.models.detectors.base`; those of several routes also take `route`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def parts(self, *args: Any, **kwargs: Any) -> dict[str, nn.Module]: ...

    def to(self, device: str) -> Any: ...


def mac_counter() -> FlopCounterMode:
    """Torch's counter, which reports 2 FLOPs per MAC, taught deformable convolution (0 otherwise)."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.torchvision.deform_conv2d: _deform_conv_flops})


def _deform_conv_flops(
    inputs: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any
) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def count_macs(detector: Counted, size: Size) -> dict[str, int]:
    """Multiply-adds of a dense pass over one image, at exactly this size, with every gate open.

    Nothing is computed: the detector is copied to the meta device.

    Args:
        detector: any detector.
        size: (H, W) of the network input in pixels; it is not padded.

    Returns:
        MACs of `backbone`, `neck`, `head`, `predictor` (what `parts` of the detector names) and their `total`.
    """
    return MacCounter(detector).count(size)


class MacCounter:
    """`count_macs` for many sizes: holds the shape of a detector as it is now, without its weights."""

    def __init__(self, detector: Counted) -> None:
        self._shell = copy.deepcopy(detector).to("meta").eval()
        for module in self._shell.modules():
            if isinstance(module, SwitchableHead):
                module.execute("dense")  # kernels have nothing to run on
        self._gates_alone: dict[str | None, bool] = {}

    def count(self, size: Size, *, route: str | None = None, gated: bool = True) -> dict[str, int]:
        """As `count_macs`.

        Args:
            size: (H, W) in pixels.
            route: of a dynamic detector, "first" or "second" (the default).
            gated: False leaves out what the gates of a head that routes decide about, and deciding it: what remains
                runs always. A head of which nothing remains is not named.
        """
        way = {} if route is None else {"route": route}
        parts = self._shell.parts(**way)
        if not gated and self._gates_alone.get(route):
            with _passed_by(parts.pop("head")):  # it is the slowest part to count
                counts, _ = self._pass(size, parts, way)
        else:
            counts, routing = self._pass(size, parts, way)
            if not gated:
                counts["head"] = 0 if routing is None else max(0, counts["head"] - _gated_macs(routing))
                self._gates_alone[route] = not counts["head"]
                if self._gates_alone[route]:
                    del counts["head"]
        counts["total"] = sum(counts.values())
        return counts

    def _pass(
        self, size: Size, parts: Mapping[str, nn.Module], way: Mapping[str, str]
    ) -> tuple[dict[str, int], Routing | None]:
        """Runs the shell: multiply-adds of every part, "other" where something runs outside of them; the routing."""
        owners = {module: name for name, part in parts.items() for module in part.modules()}
        counts = dict.fromkeys(parts, 0)
        running: list[list[int]] = []  # of every module that runs: what was counted before, and inside of it
        routings: list[Routing | None] = [None]
        counter = mac_counter()

        def enter(module: nn.Module, inputs: Any) -> None:
            if module in owners:
                running.append([counter.get_total_flops(), 0])

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            if module in owners:
                before, inside = running.pop()
                flops = counter.get_total_flops() - before
                counts[owners[module]] += (flops - inside) // 2
                if running:
                    running[-1][1] += flops
            if module is parts.get("head") and isinstance(output, HeadOutput):
                routings.append(output.routing)

        # Images that have their place: the size is that of the canvas.
        sizes = torch.tensor([size])
        images = ImageBatch(torch.empty(1, 3, *size, device="meta"), sizes, sizes, torch.zeros_like(sizes))
        hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        try:
            with torch.no_grad(), counter:
                self._shell(images, **way)
        finally:
            for hook in hooks:
                hook.remove()
        other = counter.get_total_flops() // 2 - sum(counts.values())
        return counts | ({"other": other} if other else {}), routings[-1]


def _gated_macs(routing: Routing) -> int:
    """What the gates of one image decide about, open, and what deciding costs.

    Where a head says which convolutions its gates rule, those; otherwise what its cost table says, norms among it.
    """
    known = replace(routing, gates=torch.empty_like(routing.gates, device="cpu"), valid=None)  # counts need no values
    executed = [work.executed() for work in routing.work]
    by_work = executed and not any(isinstance(macs, Tensor) for macs in executed)
    gated = math.fsum(executed) if by_work else float(known.full()[0])
    return round(gated + float(known.overhead()[0]))


@contextmanager
def _passed_by(head: nn.Module) -> Iterator[None]:
    """Inside, the head hands its inputs on."""

    def forward(features: Sequence[Tensor], valid: Sequence[Tensor] | None = None) -> HeadOutput:
        return HeadOutput(list(features), list(features))

    head.forward = forward
    try:
        yield
    finally:
        del head.forward
