"""The price of compute: a loss on what a head routed.

Source: Song et al., NeurIPS 2020, arXiv:2012.03519, Eq. 4-6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn

from dyndet.routing import Routing
from dyndet.structures import Target


class Budget(nn.Module):
    """lambda * mean over images of (soft cost / full cost).

    Args:
        weight: lambda. It buys a trade-off, not a cost: log and select on used cost.
        scale_gradient: "on" lets the budget close scale gates as well; "published" keeps their cost in the value but
            gives them no gradient, as the released code does.

    Raises:
        ValueError: on a negative weight or an unknown choice.
    """

    def __init__(self, weight: float, *, scale_gradient: Literal["on", "published"] = "on") -> None:
        super().__init__()
        if not isinstance(weight, int | float) or weight < 0:
            raise ValueError(f"weight must be a number from 0, got {weight!r}")
        if scale_gradient not in ("on", "published"):
            raise ValueError(f"scale_gradient must be 'on' or 'published', got {scale_gradient!r}")
        self.weight = weight
        self.detached = ("up", "down") if scale_gradient == "published" else ()

    def forward(
        self,
        routing: Routing,
        *,
        targets: Sequence[Target] | None = None,
        positives: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Scalar loss, weight applied.

        Args:
            routing: what to price.
            targets: per image, without crowd, in pixels of the batch. This budget does not read them; others may.
            positives: likewise; gives the (L,) share of every level's positions that the predictor's assigner makes
                positive, and assigns only when it is called. None where the predictor does not tell.
        """
        return self.weight * (routing.soft(self.detached) / routing.full()).mean().float()
