"""Gates: a small convolution and an activation that decide, per position, how far a path is open.

Source: Song et al., Fine-Grained Dynamic Head for Object Detection, NeurIPS 2020, Eq. 1-3 and the ablation of
activations. `v` is a logit, `g` a gate.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from dyndet.models.heads.init import fill_bias


def restricted_tanh(logits: Tensor, tau: float = 1.5) -> Tensor:
    """Eq. 3: max(0, (tanh(v - tau) + tanh(tau)) / (1 + tanh(tau))), exactly 0 for v <= 0, below 1.

    tau = 0 is the plain restricted tanh max(0, tanh v).
    """
    shift = math.tanh(tau)
    # The product makes closed exact: around v = 0 the two tanh may round to different values.
    return ((torch.tanh(logits - tau) + shift) / (1 + shift)).clamp(min=0) * (logits > 0)


class GateActivation(Protocol):
    """Maps the logits of a node's paths, stacked as (B, paths, H, W), to gates of the same shape.

    `joint` says that the paths compete, so that all logits must be known before any gate is.
    """

    joint: bool

    def __call__(self, logits: Tensor) -> Tensor: ...

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

    def forward(self, logits: Tensor) -> Tensor:
        return restricted_tanh(logits, self.tau)

    def logit(self, openness: float) -> float:
        return 0.5 * math.log((1 + openness * math.exp(2 * self.tau)) / (1 - openness))

    def extra_repr(self) -> str:
        return f"tau={self.tau}"


class Sigmoid(nn.Module):
    """Never zero, so it saves nothing; for the ablation."""

    joint = False

    def forward(self, logits: Tensor) -> Tensor:
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

    def forward(self, logits: Tensor) -> Tensor:
        if self.axis == "paths":
            return logits.softmax(1)
        return logits.flatten(2).softmax(2).view_as(logits)

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
    """

    def __init__(self, channels: int, *, kernel: int = 3, bias: float = 0.0, coarse: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, kernel, padding=kernel // 2)
        nn.init.normal_(self.conv.weight, std=0.01)
        fill_bias(self.conv, bias)
        self.coarse = coarse

    @property
    def macs(self) -> float:
        """Multiply-adds per position."""
        return float(self.conv.weight.numel())

    def forward(self, features: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> float32 logits (B, 1, H, W)."""
        logits = self.conv(features).float()
        if not self.coarse:
            return logits
        if valid is None:
            mean = logits.mean((2, 3), keepdim=True)
        else:
            mean = (logits * valid).sum((2, 3), keepdim=True) / valid.sum((2, 3), keepdim=True).clamp(min=1)
        return mean.expand_as(logits)
