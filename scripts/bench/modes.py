"""The modes: what runs on the dense and on the sparse side of a case, and how far the sparse result is off."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyndet.models.heads.fine_grained import FineGrainedHead, FineGrainedNode
from dyndet.models.heads.fixed import FixedHead
from dyndet.models.heads.paths import DepthPath
from dyndet.ops.sparse import Plan, RowLayout, choose, conv, make_plans, whole_plan
from dyndet.structures import HeadOutput

from . import reference
from .cases import DTYPES, Case
from .masks import ForcedGates, block_macs, masks
from .steps import detector_of, training_step
from .timing import Run


class UnavailableError(Exception):
    """A case that this machine cannot run; the message says why."""


@dataclass(frozen=True)
class Bench:
    """A case, ready to run.

    Attributes:
        dense: the reference.
        sparse: what is compared with it.
        error: relative error of what a run of the sparse side returns.
        path: execution of its convolutions.
        macs: share of the dense multiply-adds that it needs.
        masks: active positions, L x (B, 1, H, W).
        others: further executions of the same, by name.
    """

    dense: Run
    sparse: Run
    error: Callable[[Any], float]
    path: str
    macs: float
    masks: list[Tensor]
    others: dict[str, Run] = field(default_factory=dict)


class Scene:
    """Inputs of a case: random features as rows and as channels-last maps on the same memory, and active positions."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.masks = masks(case.mask, case.density / 100, case.shapes, case.batch)
        self.generator = torch.Generator().manual_seed(1)
        device = torch.empty(0, device=case.device).device
        self.layout = RowLayout(case.shapes, case.batch, device)
        self.rows = self.random(self.layout.positions + 1, case.channels)
        self.rows[-1] = 0
        self.maps = self.layout.maps(self.rows)
        self.active = self.layout.flat(self.masks)[0].to(device)

    def random(self, *shape: int) -> Tensor:
        values = torch.randn(*shape, generator=self.generator)
        return values.to(self.layout.device, DTYPES[self.case.dtype])

    def weight(self) -> Tensor:
        channels = self.case.channels
        return self.random(channels, channels, 3, 3).contiguous(memory_format=torch.channels_last) / math.sqrt(
            9 * channels
        )

    def placed(self, module: Any) -> Any:
        """A module where the features are and of their type, its weights channels-last."""
        return module.to(self.layout.device, DTYPES[self.case.dtype]).to(memory_format=torch.channels_last)

    def plans(self, gate: Tensor, reaches: Sequence[int]) -> list[Plan]:
        """Plans of the positions with an open gate; a device that counts them itself is told what to expect."""
        return make_plans(
            gate, self.layout, reaches=reaches, expected=self.case.density / 100, impl=self.case.impl
        )  # fmt: skip

    def path(self, reaches: Sequence[int]) -> str:
        plans = self.plans(self.active, reaches)
        kind = self.case.channels, self.rows.dtype, self.rows.device
        how = [choose(self.case.impl, plan.density, *kind) for plan in plans]
        return "+".join(dict.fromkeys(how))

    def at_active(self, rows: Tensor) -> Tensor:
        """(P [+ 1], C) rows of the map -> (N, C)."""
        return rows[: self.layout.positions][self.active]


def build(case: Case) -> Bench:
    """Prepares a case.

    Raises:
        UnavailableError: where it cannot run.
    """
    return {
        "conv": _conv, "block": _block, "train": _train, "head": _head, "trainhead": _train_head, "step": _step,
        "subm": _subm,
    }[case.mode](Scene(case))  # fmt: skip


def _conv(scene: Scene) -> Bench:
    """One convolution from the map to a ready plan: rows in, rows out."""
    case, maps, weight = scene.case, scene.maps, scene.weight()
    whole, (plan,) = whole_plan(scene.layout), scene.plans(scene.active, (0,))

    @torch.no_grad()
    def sparse() -> Tensor:
        return conv(scene.rows, weight, source=whole, target=plan, impl=case.impl)

    @torch.no_grad()
    def dense() -> list[Tensor]:
        return [F.conv2d(x, weight, padding=1) for x in maps]

    plain, plain_weight = [x.contiguous() for x in maps], weight.contiguous()
    marks = [mask.to(scene.layout.device) for mask in scene.masks]

    @torch.no_grad()
    def published() -> list[Tensor]:
        return [published_conv(x, plain_weight, mask) for x, mask in zip(plain, marks, strict=True)]

    def error(output: Tensor) -> float:
        wanted = scene.at_active(scene.layout.rows(reference.conv(maps, weight)))
        return reference.distance(output[: len(wanted)], wanted)

    return Bench(dense, sparse, error, scene.path((0,)), _share(scene), scene.masks, {"published": published})


def published_conv(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """The released form: a column buffer of the active positions, one product, scattered to a map of zeros.

    Args:
        x: (B, C, H, W), contiguous.
        weight: (O, C, 3, 3).
        mask: (B, 1, H, W) bool.
    """
    batch, channels, height, width = x.shape
    out = x.new_zeros(batch, len(weight), height, width)
    padded = F.pad(x, (1, 1, 1, 1))
    step = torch.arange(3, device=x.device)
    taps = (step[:, None] * (width + 2) + step).view(9, 1)
    matrix = weight.reshape(len(weight), -1)
    for image, values, active in zip(out, padded, mask[:, 0], strict=True):  # it serves one image at a time
        row, column = active.nonzero(as_tuple=True)
        index = (taps + row * (width + 2) + column).view(-1)
        columns = values.view(channels, -1).index_select(1, index).view(channels * 9, -1)
        image.view(len(weight), -1).index_copy_(1, row * width + column, matrix @ columns)
    return out


def _block(scene: Scene) -> Bench:
    """The depth block of a node, plans included."""
    case, maps = scene.case, scene.maps
    torch.manual_seed(0)
    path: DepthPath = scene.placed(DepthPath(case.channels, case.groups)).eval()
    gate = scene.active * torch.rand(scene.layout.positions, generator=scene.generator).to(scene.layout.device)
    gates = [value.to(scene.rows.dtype) for value in scene.layout.unflat(gate)]

    @torch.no_grad()
    def sparse() -> Tensor:
        inner, outer = scene.plans(gate, (1, 0))
        return path.gated(scene.rows, gate, inner, outer, stats=case.norm, impl=case.impl)[0]

    @torch.no_grad()
    def dense() -> list[Tensor]:
        return [F.relu(x + value * path(x)) for x, value in zip(maps, gates, strict=True)]

    @torch.no_grad()
    def error(output: Tensor) -> float:
        marks = [mask.to(scene.layout.device) for mask in scene.masks]
        wanted = reference.block(path, maps, scene.layout.unflat(gate), marks, case.norm)
        return reference.distance(scene.at_active(output), scene.at_active(scene.layout.rows(wanted)))

    return Bench(dense, sparse, error, scene.path((1, 0)), block_macs(scene.masks), scene.masks)


def _train(scene: Scene) -> Bench:
    """One convolution, forward and backward."""
    case, layout = scene.case, scene.layout
    weight = scene.weight().requires_grad_()
    rows = scene.rows.requires_grad_()
    whole, (plan,) = whole_plan(layout), scene.plans(scene.active, (0,))
    grad = scene.random(plan.capacity + 1, case.channels)
    leaves = [x.detach().requires_grad_() for x in scene.maps]
    grads = [torch.randn_like(x) for x in leaves]

    def sparse() -> tuple[Tensor, ...]:
        out = conv(rows, weight, source=whole, target=plan, impl=case.impl)
        return (out, *torch.autograd.grad(out, (rows, weight), grad))

    def dense() -> tuple[Tensor, ...]:
        outs = [F.conv2d(x, weight, padding=1) for x in leaves]
        return torch.autograd.grad(outs, (*leaves, weight), grads)

    def error(output: tuple[Tensor, Tensor, Tensor]) -> float:
        out, of_rows, of_weight = (value.detach() for value in output)
        inputs, kernel = (value.detach().double().requires_grad_() for value in (rows, weight))
        wanted = scene.at_active(layout.rows(reference.conv(layout.maps(inputs), kernel)))
        grads = torch.autograd.grad(wanted, (inputs, kernel), grad[: len(wanted)].double())
        return reference.worst([
            reference.distance(out[: len(wanted)], wanted.detach()),
            reference.distance(of_rows[:-1], grads[0][:-1]),
            reference.distance(of_weight, grads[1]),
        ])  # fmt: skip

    return Bench(dense, sparse, error, scene.path((0,)), _share(scene), scene.masks)


def _head(scene: Scene) -> Bench:
    """A whole head; the dense side computes every position of the same head, or on CUDA of its static twin.

    Counting positions on the host, which the dense execution of a gated head does, rules a CUDA graph out.
    """
    head, twin = _gated(scene).eval(), _static(scene).eval()

    @torch.no_grad()
    def sparse() -> HeadOutput:
        return head(scene.maps)

    @torch.no_grad()
    def fixed() -> HeadOutput:
        return twin(scene.maps)

    common = _head_error(scene, head), scene.path((1, 0)), _head_macs(sparse()), scene.masks
    if scene.case.device == "cuda":
        return Bench(fixed, sparse, *common)
    reference_head = _all_dense(copy.deepcopy(head))

    @torch.no_grad()
    def dense() -> HeadOutput:
        return reference_head(scene.maps)

    return Bench(dense, sparse, *common, {"fixed": fixed})


def _train_head(scene: Scene) -> Bench:
    """A whole head forward and backward, against its static twin."""
    head, twin = _gated(scene).train(), _static(scene).train()
    features = [x.detach().requires_grad_() for x in scene.maps]
    grads = [torch.randn_like(x) for x in [*features, *features]]

    def step(module: nn.Module) -> HeadOutput:
        for leaf in [*features, *module.parameters()]:
            leaf.grad = None
        output = module(features)
        torch.autograd.backward([*output.cls, *output.reg], grads)
        return output

    # Gradients are not compared: where a ReLU's input is next to zero, one of float32 may take the other side.
    return Bench(
        lambda: step(twin), lambda: step(head), _head_error(scene, head), scene.path((1, 0)),
        _head_macs(head(scene.maps)), scene.masks,
    )  # fmt: skip


def _step(scene: Scene) -> Bench:
    """A training step of `bccd_dyn`, against the same with the fixed head; of the case it takes batch, size, density.

    What is checked is the head of the case, which has the size of that experiment.
    """
    case, head = scene.case, _gated(scene).eval()
    height, width = (8 * side for side in case.shapes[0])
    dense, sparse = (
        training_step(detector_of("bccd_dyn", density), case.batch, (height, width))
        for density in (None, case.density / 100)
    )
    check = _head_error(scene, head)

    @torch.no_grad()
    def run() -> HeadOutput:
        return head(scene.maps)

    return Bench(dense, sparse, lambda _: check(run()), scene.path((1, 0)), _head_macs(run()), scene.masks)


def _gated(scene: Scene) -> FineGrainedHead:
    case = scene.case
    torch.manual_seed(0)
    head = FineGrainedHead(
        case.channels, depth=case.depth, activation=ForcedGates(scene.active), norm_groups=case.groups,
        norm_stats=case.norm, scale_init=1.0, impl=case.impl, expected_density=case.density / 100,
    )  # fmt: skip
    return scene.placed(head)


def _static(scene: Scene) -> FixedHead:
    case = scene.case
    torch.manual_seed(0)
    return scene.placed(FixedHead(case.channels, depth=case.depth, norm_groups=case.groups))


def _all_dense(head: FineGrainedHead) -> FineGrainedHead:
    for module in head.modules():
        if isinstance(module, FineGrainedNode):
            module.impl = "dense"
    return head


def _head_error(scene: Scene, head: FineGrainedHead) -> Callable[[HeadOutput], float]:
    @torch.no_grad()
    def error(output: HeadOutput) -> float:
        exact = _all_dense(copy.deepcopy(head)).double()([x.detach().double() for x in scene.maps])
        pairs = ((output.cls, exact.cls), (output.reg, exact.reg))
        found, wanted = (
            torch.cat([scene.at_active(scene.layout.rows(maps)) for maps in sides])
            for sides in zip(*pairs, strict=True)
        )
        return reference.distance(found.detach(), wanted)

    return error


def _head_macs(output: HeadOutput) -> float:
    routing = output.routing
    assert routing is not None
    return float(routing.used().sum() / routing.full().sum())


def _subm(scene: Scene) -> Bench:
    """Rows to the same rows, against the submanifold convolution of spconv-triton, whose index is ready too."""
    case, layout = scene.case, scene.layout
    try:
        spconv = import_module("spconv_triton.pytorch")
    except ImportError as missing:
        raise UnavailableError(f"spconv-triton is not installed ({missing})") from missing
    if len(case.shapes) != 1:
        raise UnavailableError(f"spconv-triton takes a single level, not {case.levels}")
    weight, (plan,) = scene.weight(), scene.plans(scene.active, (0,))
    features = scene.at_active(scene.rows).contiguous()
    x = scene.rows.new_zeros(plan.capacity + 1, case.channels)
    x[: len(features)] = features

    layer = spconv.SubMConv2d(case.channels, case.channels, 3, bias=False, indice_key="plan")
    layer = layer.to(layout.device, scene.rows.dtype).eval()  # its weight lies as (O, 3, 3, I)
    with torch.no_grad():
        layer.weight.copy_(weight.permute(0, 2, 3, 1))
        index = scene.masks[0][:, 0].nonzero().int().to(layout.device)
        inputs = spconv.SparseConvTensor(features, index, list(case.shapes[0]), case.batch)
        ready = layer(inputs).replace_feature(features)

    @torch.no_grad()
    def sparse() -> Tensor:
        return conv(x, weight, source=plan, target=plan, impl=case.impl)

    @torch.no_grad()
    def dense() -> Tensor:
        return layer(ready).features

    def error(output: Tensor) -> float:
        seen = [x * mask.to(layout.device) for x, mask in zip(scene.maps, scene.masks, strict=True)]
        wanted = scene.at_active(layout.rows(reference.conv(seen, weight)))
        if not reference.distance(dense(), wanted) <= 10 * case.limit:
            raise RuntimeError("spconv-triton computes something else")
        return reference.distance(output[: len(wanted)], wanted)

    return Bench(dense, sparse, error, scene.path((0,)), _share(scene), scene.masks)


def _share(scene: Scene) -> float:
    return float(scene.active.float().mean())
