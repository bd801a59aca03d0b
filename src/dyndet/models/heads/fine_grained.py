"""The fine-grained dynamic head: per-position gates choose among scale-up, depth and scale-down paths.

Source: Song et al., Fine-Grained Dynamic Head for Object Detection, NeurIPS 2020, arXiv:2012.03519; conventions of the
published code.
Legend: B images, C channels, L levels; x a node's input, s the sum after the scale step, y its output.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from dyndet.layout import RowLayout
from dyndet.models.detectors.base import Branch
from dyndet.models.heads.branches import BRANCHES, check_branches
from dyndet.models.heads.expected_density import DensityEstimate, NodeDensity, counted_later
from dyndet.models.heads.fixed import FixedHead
from dyndet.models.heads.gates import GateActivation, GateConv, RestrictedTanh, gate_logits
from dyndet.models.heads.init import check_groups
from dyndet.models.heads.paths import DepthPath, ScalePath
from dyndet.ops.sparse import (
    Impl,
    Plan,
    Stats,
    autocast_dtype,
    check_impl,
    exchange,
    make_plans,
    sending,
    whole_plan,
)
from dyndet.routing import GatedPath, Routing, Work
from dyndet.structures import HeadOutput

NormStats = Literal["active", "position", "dense", "published"]
Gating = Literal["both", "depth", "scale", "none"]


PATHS = ("down", "up", "depth")
_CLOSED = -1e4  # logit of a position that does not exist


class FineGrainedNode(nn.Module):
    """One node of the routing space: exchange with neighbouring levels, then go deeper.

        u = g_down(x) * down(x)   v = g_up(x) * up(x)
        s = output_weight * x + scale_weight * (u from the finer level + v from the coarser level)
        y = ReLU(s + g_depth(s) * depth(s))

    The identity is never gated, so a position whose gates are closed costs nothing and passes through. The arguments
    are those of `FineGrainedHead`.
    """

    def __init__(
        self,
        channels: int,
        *,
        activation: GateActivation,
        norm_groups: int,
        norm_stats: NormStats,
        gating: Gating,
        gate_kernel: int,
        openness: float,
        scale_init: float,
        coarse: bool,
        cost_table: Literal["published", "corrected"],
        impl: Impl,
    ) -> None:
        super().__init__()
        self.down = ScalePath(channels, norm_groups)
        self.up = ScalePath(channels, norm_groups)
        self.depth = DepthPath(channels, norm_groups)
        self.output_weight = nn.Parameter(torch.ones(1))
        self.scale_weight = nn.Parameter(torch.full((1,), scale_init))
        gated = {"both": ("down", "up", "depth"), "scale": ("down", "up"), "depth": ("depth",), "none": ()}[gating]
        bias = activation.logit(openness)
        gates = {path: GateConv(channels, kernel=gate_kernel, bias=bias, coarse=coarse) for path in gated}
        self.gates = nn.ModuleDict(gates)
        self.activation = activation
        self.norm_stats: NormStats = norm_stats
        self.impl: Impl = impl
        self.gate_threshold = 0.0
        scale_costs = self.down.costs(published=cost_table == "published")
        self.router_macs = {path: gate.macs for path, gate in gates.items()}
        self.costs = {"down": scale_costs, "up": scale_costs, "depth": self.depth.costs()}

    def forward(
        self, name: str, rows: Tensor, layout: RowLayout, valid: Tensor | None, expected: NodeDensity
    ) -> tuple[Tensor, dict[str, Tensor], list[Work]]:
        """(P + 1, C) -> outputs of the same shape, the gates (P,) by path, and the work done, by the node's `name`."""
        # Competing gates (softmax over paths) must all be decided on x; otherwise the depth gate waits for s.
        first = PATHS if self.activation.joint else PATHS[:2]
        gates = self._decide(first, rows, layout, valid)
        down, work_down = self._sent(self.down, rows, gates["down"], layout, 1, expected.down)
        up, work_up = self._sent(self.up, rows, gates["up"], layout, -1, expected.up)
        s = exchange(rows, down, up, self.output_weight, layout)
        if "depth" not in gates:
            gates |= self._decide(("depth",), s, layout, valid)
        inner, outer = self._depth_plans(gates["depth"], layout, valid, (expected.inner, expected.outer))
        outputs, work_depth = self.depth.gated(s, gates["depth"], inner, outer, stats=self._stats, impl=self.impl)
        work = [replace(item, node=name) for item in (work_down, work_up, *work_depth)]
        return outputs, gates, work

    def _decide(self, paths: Sequence[str], rows: Tensor, layout: RowLayout, valid: Tensor | None) -> dict[str, Tensor]:
        """Gates (P,) of the paths; an ungated path is fully open. Padding is closed."""
        decided = [path for path in paths if path in self.gates]
        gates: dict[str, Tensor] = {}
        if decided:
            convs = [cast(GateConv, self.gates[path]) for path in decided]
            logits = gate_logits(convs, rows, layout, valid)
            if valid is not None:  # a softmax over positions must not spend on padding
                logits = logits.masked_fill(~valid, _CLOSED)
            opened = self.activation(logits, layout)
            if self.gate_threshold > 0:
                opened = opened * (opened > self.gate_threshold)
            gates = dict(zip(decided, opened, strict=True))
        for path in paths:
            gate = gates[path] if path in gates else rows.new_ones(layout.positions, dtype=torch.float32)
            gates[path] = gate if valid is None else gate * valid
        return gates

    def _sent(
        self, path: ScalePath, rows: Tensor, gate: Tensor, layout: RowLayout, step: int, expected: float | None
    ) -> tuple[Tensor, Work]:
        """What every level sends `step` levels on, and the work done. What has no receiver is not computed."""
        opened = gate.detach()
        if not self._sparse:  # every position that has a receiver
            opened, expected = torch.ones_like(opened), 1.0
        (plan,) = make_plans(opened, layout, valid=sending(layout, step), expected=(expected,), impl=self.impl)
        # What arrives is weighed here, where it is a factor of a few numbers.
        return path.gated(rows, gate * self.scale_weight, plan, stats=self._stats, impl=self.impl)

    def _depth_plans(
        self, gate: Tensor, layout: RowLayout, valid: Tensor | None, expected: Sequence[float | None]
    ) -> list[Plan]:
        """Around the open gates, and at them."""
        if self._sparse or (self.norm_stats == "published" and not self.training):
            return make_plans(gate.detach(), layout, valid=valid, reaches=(1, 0), expected=expected, impl=self.impl)
        return [whole_plan(layout), whole_plan(layout)]

    @property
    def _sparse(self) -> bool:
        return self.norm_stats in ("active", "position")

    @property
    def _stats(self) -> Stats:
        return "position" if self.norm_stats == "position" else "active"

    def described(self, name: str, path: str) -> GatedPath:
        """What the gate of a path decides about, under the node's `name`."""
        sparse = self.norm_stats != "dense"
        return GatedPath(name, path, self.costs[path], self.router_macs.get(path, 0.0), sparse)


class FineGrainedHead(nn.Module):
    """Branches (classification, regression) of `depth` gated nodes, each with its own routers.

    Args:
        channels: C of the pyramid.
        depth: nodes per branch, D in the paper (NUM_CONVS = 2 D in its code).
        activation: gate activation; None is the generalised restricted tanh with tau = 1.5.
        norm_groups: groups of every GroupNorm.
        norm_stats: positions that GroupNorm sees. "active": those executed, in training and inference alike;
            "position": each position alone, over the channels of a group, so that none depends on another; "dense":
            all, which rules sparse execution out; "published": all in training, and at inference the active ones in
            the depth path (what the released weights expect; training and inference differ).
        gating: paths that have gates; the others are always on ("both", "depth", "scale", "none").
        gate_kernel: kernel of the gate convolutions.
        openness: value of every gate at the start (0.99 published; short schedules need less).
        scale_init: weight of the scale paths at the start (0 published, so that they first have no effect; 1 is how the
            static twin starts, and what short schedules need).
        coarse: one decision per image, level and path instead of one per position (the paper's baseline).
        cost_table: "published" counts scale convolutions twice as the released code does, "corrected" once.
        impl: execution of the sparse operations, see `dyndet.ops.sparse.Impl`.
        expected_density: share of open gates to prepare for, where they are counted on a GPU and nothing waits for the
            count; it chooses between dense and sparse execution and the size of tiles. None expects what an earlier
            step found, at first `openness`, see `DensityEstimate`; what is compiled or exported then expects few.
        branches: which to build and run, see `Predictor.reads`.
    """

    def __init__(
        self,
        channels: int,
        *,
        depth: int = 8,
        activation: GateActivation | None = None,
        norm_groups: int = 32,
        norm_stats: NormStats = "active",
        gating: Gating = "both",
        gate_kernel: int = 3,
        openness: float = 0.99,
        scale_init: float = 0.0,
        coarse: bool = False,
        cost_table: Literal["published", "corrected"] = "corrected",
        impl: Impl = "auto",
        expected_density: float | None = None,
        branches: Sequence[Branch] = BRANCHES,
    ) -> None:
        super().__init__()
        for key, value, allowed in (
            ("norm_stats", norm_stats, ("active", "position", "dense", "published")),
            ("gating", gating, ("both", "depth", "scale", "none")),
            ("cost_table", cost_table, ("published", "corrected")),
        ):
            if value not in allowed:
                raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {value!r}")
        check_impl(impl)
        check_groups(channels, norm_groups, "norm_groups")
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if not 0 < openness < 1:
            raise ValueError(f"openness must lie between 0 and 1, got {openness}")

        def nodes() -> nn.ModuleList:
            return nn.ModuleList(
                FineGrainedNode(
                    channels,
                    activation=activation or RestrictedTanh(),
                    norm_groups=norm_groups,
                    norm_stats=norm_stats,
                    gating=gating,
                    gate_kernel=gate_kernel,
                    openness=openness,
                    scale_init=scale_init,
                    coarse=coarse,
                    cost_table=cost_table,
                    impl=impl,
                )
                for _ in range(depth)
            )

        self.branches = check_branches(branches)
        for branch in self.branches:
            self.add_module(branch, nodes())
        self.norm_stats: NormStats = norm_stats
        self.expected_density = expected_density
        self._densities = DensityEstimate(openness)

    def execute(self, impl: Impl) -> Impl:
        """Sets the execution of all nodes and returns the one before; results stay the same."""
        check_impl(impl)
        before = self._nodes(self.branches[0])[0].impl
        for branch in self.branches:
            for node in self._nodes(branch):
                node.impl = impl
        return before

    @property
    def gate_threshold(self) -> float:
        """Gates that are open less than this, or just so, close; 0 leaves them as they learned."""
        return self._nodes(self.branches[0])[0].gate_threshold

    def close_below(self, threshold: float) -> None:
        """Sets `gate_threshold`: one trained head at many speeds.

        Raises:
            ValueError: unless it lies between 0 and 1.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"gates lie between 0 and 1, so does their threshold, got {threshold}")
        for branch in self.branches:
            for node in self._nodes(branch):
                node.gate_threshold = threshold

    def fixed_twin(self) -> FixedHead:
        """The fixed head of the same size with copies of this one's weights, in eval mode, to compare its time with.

        It has no gates and no weight of the scale paths. With statistics over active positions both compute the same
        where gates are 1 and that weight is 1.
        """
        first = self._nodes(self.branches[0])
        norm = first[0].down.norm
        with torch.device("meta"):  # nothing is drawn for weights that are replaced
            twin = FixedHead(
                norm.num_channels, depth=len(first), norm_groups=norm.num_groups,
                ignore_padding=self.norm_stats != "published", branches=self.branches,
            )  # fmt: skip
        for branch in self.branches:
            for node, fixed in zip(self._nodes(branch), getattr(twin, branch), strict=True):
                for part in ("down", "up", "depth", "output_weight"):
                    setattr(fixed, part, copy.deepcopy(getattr(node, part)))
        return twin.eval()

    def forward(self, features: Sequence[Tensor], valid: Sequence[Tensor] | None = None) -> HeadOutput:
        """Routes a pyramid.

        Args:
            features: L x (B, C, H, W), finest first.
            valid: L x (B, 1, H, W) bool, False on padding; None when there is none. The published mode routes padding
                like any other position.

        Returns:
            Features of every branch, in the shapes of the input, and the `Routing` of all nodes.
        """
        layout = RowLayout.of(features)
        area = layout.flat(valid)[0] if valid and self.norm_stats != "published" else None
        start = layout.rows(features)
        start = start.to(autocast_dtype(start))  # the residual stream too: half of the head's time is moving it
        impl = self._nodes(self.branches[0])[0].impl
        learning = self.expected_density is None and counted_later(start, impl)
        if learning:
            self._densities.refresh()
        decided: list[tuple[FineGrainedNode, str, dict[str, Tensor]]] = []
        work: list[Work] = []
        outputs: dict[str, list[Tensor]] = {}
        for branch in self.branches:
            rows = start
            for index, node in enumerate(self._nodes(branch)):
                name = f"{branch}.{index}"
                expected = self._densities.of(name) if learning else NodeDensity.of_gates(self.expected_density)
                rows, gates, done = node(name, rows, layout, area, expected)
                decided.append((node, name, gates))
                work += done
            outputs[branch] = layout.maps(rows)
        if learning:
            self._densities.observe(work, layout.positions)
        # Path by path, so that all that cost the same are neighbours.
        order = [(node, name, path, gates[path]) for path in PATHS for node, name, gates in decided]
        paths = tuple(node.described(name, path) for node, name, path, _ in order)
        routing = Routing(layout, paths, torch.stack([gate for *_, gate in order]), area, work)
        return HeadOutput.of(outputs, routing)

    def _nodes(self, branch: Branch) -> list[FineGrainedNode]:
        return cast(list[FineGrainedNode], list(getattr(self, branch)))
