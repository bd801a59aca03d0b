"""The fine-grained dynamic head: per-position gates choose among scale-up, depth and scale-down paths.

Source: Song et al., Fine-Grained Dynamic Head for Object Detection, NeurIPS 2020; conventions of the published code.
Legend: B images, C channels, L levels; x a node's input, s the sum after the scale step, y its output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyndet.models.heads.gates import GateActivation, GateConv, RestrictedTanh
from dyndet.models.heads.paths import DepthPath, ScalePath, exchange
from dyndet.ops.conv import Impl
from dyndet.structures import HeadOutput, PathGate, Routing

NormStats = Literal["active", "dense", "published"]
Gating = Literal["both", "depth", "scale", "none"]


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
        scale_costs = self.down.costs(published=cost_table == "published")
        self.router_macs = {path: gate.macs for path, gate in gates.items()}
        self.costs = {"down": scale_costs, "up": scale_costs, "depth": self.depth.costs()}

    def forward(
        self, name: str, features: Sequence[Tensor], valid: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[PathGate]]:
        """L x (B, C, H, W) -> outputs of the same shapes, and the node's gates under the node's `name`."""
        decisions: list[PathGate] = []
        down, up, depth_gates = [], [], []
        for level, (x, area) in enumerate(zip(features, valid, strict=True)):
            # Competing gates (softmax over paths) must all be decided on x; otherwise the depth gate waits for s.
            gates = self._decide(("down", "up", "depth") if self.activation.joint else ("down", "up"), x, area)
            depth_gates.append(gates.pop("depth", None))
            for path, gate in gates.items():
                decisions.append(self._record(name, path, level, gate, area))
            down.append(self._scale(self.down, x, gates["down"]))
            up.append(self._scale(self.up, x, gates["up"]))
        outputs = []
        for level, (x, neighbours) in enumerate(zip(features, exchange(down, up), strict=True)):
            area = valid[level]
            s = self.output_weight * x
            if neighbours is not None:
                s = s + self.scale_weight * neighbours
            gate = depth_gates[level]
            if gate is None:
                gate = self._decide(("depth",), s, area)["depth"]
            decision = self._record(name, "depth", level, gate, area)
            decisions.append(decision)
            outputs.append(F.relu(s + self._deepen(s, decision)))
        return outputs, decisions

    def _decide(self, paths: Sequence[str], x: Tensor, area: Tensor | None) -> dict[str, Tensor]:
        """Gates (B, 1, H, W) of the paths; an ungated path is fully open. Padding is closed."""
        decided = [path for path in paths if path in self.gates]
        logits = [self.gates[path](x, area) for path in decided]
        if area is not None:  # a softmax over positions must not spend on padding
            logits = [logit.masked_fill(~area, _CLOSED) for logit in logits]
        gates = dict(zip(decided, self.activation(torch.cat(logits, 1)).split(1, 1), strict=True)) if decided else {}
        for path in paths:
            gate = gates[path] if path in gates else x.new_ones(x.shape[0], 1, *x.shape[2:], dtype=torch.float32)
            gates[path] = gate if area is None else gate * area
        return gates

    def _record(self, name: str, path: str, level: int, gate: Tensor, area: Tensor | None) -> PathGate:
        return PathGate(
            name, path, level, gate, self.costs[path], self.router_macs.get(path, 0.0), area, self.norm_stats != "dense"
        )

    def _scale(self, path: ScalePath, x: Tensor, gate: Tensor) -> Tensor:
        mask = gate > 0 if self.norm_stats == "active" else None
        return path(x, mask) * gate.to(x.dtype)

    def _deepen(self, s: Tensor, decision: PathGate) -> Tensor:
        """The gated residual branch; sparse wherever the statistics allow it."""
        gate = decision.gate.to(s.dtype)
        if self.norm_stats == "dense" or (self.norm_stats == "published" and self.training):
            return self.depth(s) * gate
        return self.depth.masked(s, decision.mask(1), decision.mask(0), self.impl) * gate


class FineGrainedHead(nn.Module):
    """Two branches (classification, regression) of `depth` gated nodes, each with its own routers.

    Args:
        channels: C of the pyramid.
        depth: nodes per branch, D in the paper (NUM_CONVS = 2 D in its code).
        activation: gate activation; None is the generalised restricted tanh with tau = 1.5.
        norm_groups: groups of every GroupNorm.
        norm_stats: positions that GroupNorm sees. "active": those executed, in training and inference alike;
            "dense": all, which rules sparse execution out; "published": all in training, and at inference the active
            ones in the depth path (what the released weights expect; training and inference differ).
        gating: paths that have gates; the others are always on ("both", "depth", "scale", "none").
        gate_kernel: kernel of the gate convolutions.
        openness: value of every gate at the start (0.99 published; short schedules need less).
        scale_init: weight of the scale paths at the start (0 published, so that they first have no effect; 1 is how the
            static twin starts, and what short schedules need).
        coarse: one decision per image, level and path instead of one per position (the paper's baseline).
        cost_table: "published" counts scale convolutions twice as the released code does, "corrected" once.
        impl: execution of the masked convolutions.
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
    ) -> None:
        super().__init__()
        for key, value, allowed in (
            ("norm_stats", norm_stats, ("active", "dense", "published")),
            ("gating", gating, ("both", "depth", "scale", "none")),
            ("cost_table", cost_table, ("published", "corrected")),
            ("impl", impl, ("auto", "dense", "gather")),
        ):
            if value not in allowed:
                raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {value!r}")
        if depth < 1 or gate_kernel % 2 == 0:
            raise ValueError(f"depth must be at least 1 and gate_kernel odd, got {depth} and {gate_kernel}")
        if not 0 < openness < 1:
            raise ValueError(f"openness must lie between 0 and 1, got {openness}")

        def branch() -> nn.ModuleList:
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

        self.cls = branch()
        self.reg = branch()
        self.norm_stats: NormStats = norm_stats

    def forward(self, features: Sequence[Tensor], valid: Sequence[Tensor] | None = None) -> HeadOutput:
        """Routes a pyramid.

        Args:
            features: L x (B, C, H, W), finest first.
            valid: L x (B, 1, H, W) bool, False on padding; None when there is none. The published mode routes padding
                like any other position.

        Returns:
            Features of both branches, in the shapes of the input, and the `Routing` of all nodes.
        """
        areas: Sequence[Tensor | None] = valid if valid and self.norm_stats != "published" else [None] * len(features)
        routing = Routing()
        branches = []
        for label, nodes in (("cls", self.cls), ("reg", self.reg)):
            outputs = list(features)
            for index, node in enumerate(nodes):
                outputs, decisions = node(f"{label}.{index}", outputs, areas)
                routing.gates.extend(decisions)
            branches.append(outputs)
        return HeadOutput(branches[0], branches[1], routing)
