"""Gates: a small convolution and an activation that decide, per position, how far a path is open.

Source: Song et al., Fine-Grained Dynamic Head for Object Detection, NeurIPS 2020, arXiv:2012.03519, Eq. 1-3 and the
ablation of activations. `v` is a logit, `g` a gate; the P positions of all levels and images are decided at once
(`RowLayout`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from dyndet.models.heads.init import fill_bias
from dyndet.ops import sparse
from dyndet.ops.sparse import RowLayout


def restricted_tanh(logits: Tensor, tau: float = 1.5) -> Tensor:
    """Eq. 3: max(0, (tanh(v - tau) + tanh(tau)) / (1 + tanh(tau))), exactly 0 for v <= 0, below 1.

    tau = 0 is the plain restricted tanh max(0, tanh v).
    """
    shift = math.tanh(tau)
    # The product makes closed exact: around v = 0 the two tanh may round to different values.
    return ((torch.tanh(logits - tau) + shift) / (1 + shift)).clamp(min=0) * (logits > 0)


class GateActivation(Protocol):
    """Maps the logits of a node's paths, stacked as (paths, P), to gates of the same shape.

    `joint` says that the paths compete, so that all logits must be known before any gate is.
    """

    joint: bool

    def __call__(self, logits: Tensor, layout: RowLayout) -> Tensor: ...

    def logit(self, openness: float) -> float:
        """The logit at which a gate has the value `openness`: where gate biases start."""
        ...


class RestrictedTanh(nn.Module):
    """The generalised restricted tanh of Eq. 3."""

    joint = False

    def __init__(self, tau: float = 1.5) -> None:
        super().__init__()
        if tau < 0:
            raise ValueError(f"tau must be >= 0, got {tau}")
        self.tau = tau

    def forward(self, logits: Tensor, layout: RowLayout) -> Tensor:
        return restricted_tanh(logits, self.tau)

    def logit(self, openness: float) -> float:
        return 0.5 * math.log((1 + openness * math.exp(2 * self.tau)) / (1 - openness))

    def extra_repr(self) -> str:
        return f"tau={self.tau}"


class Sigmoid(nn.Module):
    """Never zero, so it saves nothing; for the ablation."""

    joint = False

    def forward(self, logits: Tensor, layout: RowLayout) -> Tensor:
        return logits.sigmoid()

    def logit(self, openness: float) -> float:
        return math.log(openness / (1 - openness))


class Softmax(nn.Module):
    """Attention-like gates that are never zero; for the ablation.

    The paper does not name the axis. "paths" lets the paths of a node compete at each position (the reading used for
    its table), "positions" lets the positions of a map compete for each path.
    """

    def __init__(self, axis: Literal["paths", "positions"] = "paths") -> None:
        super().__init__()
        if axis not in ("paths", "positions"):
            raise ValueError(f"softmax axis must be 'paths' or 'positions', got {axis!r}")
        self.axis = axis
        self.joint = axis == "paths"

    def forward(self, logits: Tensor, layout: RowLayout) -> Tensor:
        if self.axis == "paths":
            return logits.softmax(0)
        levels = [
            logits[:, start:stop].view(len(logits), layout.batch, -1).softmax(2).flatten(1)
            for start, stop in layout.levels
        ]
        return torch.cat(levels, 1)

    def logit(self, openness: float) -> float:
        return 0.0  # a common shift of all logits changes nothing

    def extra_repr(self) -> str:
        return f"axis={self.axis}"


class GateConv(nn.Module):
    """Eq. 1 before the activation: one logit per position, shared by all positions and levels.

    Args:
        channels: C of the features it reads.
        kernel: 3 in the published code, perhaps 1 in the paper.
        bias: initial logit, see `GateActivation.logit`.
        coarse: average the logits over the valid positions, so that a level opens or closes as a whole.

    Raises:
        ValueError: on another kernel.
    """

    def __init__(self, channels: int, *, kernel: int = 3, bias: float = 0.0, coarse: bool = False) -> None:
        super().__init__()
        if kernel not in (1, 3):
            raise ValueError(f"gate_kernel must be 1 or 3, got {kernel}")
        self.conv = nn.Conv2d(channels, 1, kernel, padding=kernel // 2)
        nn.init.normal_(self.conv.weight, std=0.01)
        fill_bias(self.conv, bias)
        self.coarse = coarse

    @property
    def macs(self) -> float:
        """Multiply-adds per position."""
        return float(self.conv.weight.numel())

    def forward(self, rows: Tensor, layout: RowLayout, valid: Tensor | None = None) -> Tensor:
        """(P + 1, C) rows of features -> float32 logits (P,)."""
        return gate_logits([self], rows, layout, valid)[0]


def gate_logits(gates: Sequence[GateConv], rows: Tensor, layout: RowLayout, valid: Tensor | None = None) -> Tensor:
    """The logits of gates that read the same features: (P + 1, C) -> float32 (gates, P)."""
    logits = sparse.gate_logits(rows, torch.cat([gate.conv.weight for gate in gates]), layout)
    logits = logits + torch.stack([gate.conv.bias for gate in gates if gate.conv.bias is not None])
    return _level_means(logits, layout, valid) if gates[0].coarse else logits


def _level_means(logits: Tensor, layout: RowLayout, valid: Tensor | None) -> Tensor:
    """Every logit replaced by the mean over the valid positions of its image and level."""
    levels = []
    for start, stop in layout.levels:
        maps = logits[:, start:stop].view(len(logits), layout.batch, -1)
        if valid is None:
            mean = maps.mean(2, keepdim=True)
        else:
            area = valid[start:stop].view(layout.batch, -1)
            mean = (maps * area).sum(2, keepdim=True) / area.sum(1, keepdim=True).clamp(min=1)
        levels.append(mean.expand_as(maps).flatten(1))
    return torch.cat(levels, 1)
