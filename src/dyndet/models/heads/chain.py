"""Attention first, then any other head: DyHead before plain or fine-grained towers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from dyndet.errors import UserError
from dyndet.models.detectors.base import Branch, Head
from dyndet.models.heads.branches import BRANCHES, with_branches
from dyndet.structures import HeadOutput, Target


class HeadChain(nn.Module):
    """Two heads in a row.

    Args:
        channels: C of the pyramid, given to both.
        attention: called with `channels`: a head whose two outputs are the same maps, such as `DyHead`.
        towers: called with `channels`: the head that reads them; its routing is the chain's.
        branches: those of the towers, which get them as `branches` where they are not all.

    Raises:
        UserError: if the towers cannot leave a branch out.
    """

    attention: Head
    towers: Head

    def __init__(
        self,
        channels: int,
        *,
        attention: Callable[..., Head],
        towers: Callable[..., Head],
        branches: Sequence[Branch] = BRANCHES,
    ) -> None:
        super().__init__()
        self.attention = _one_branch(attention)(channels=channels)
        self.towers = with_branches(towers, branches)(channels=channels)

    def forward(
        self,
        features: Sequence[Tensor],
        valid: Sequence[Tensor] | None = None,
        *,
        targets: Sequence[Target] | None = None,
    ) -> HeadOutput:
        """L x (B, C, H, W) -> what the towers make of the attended maps; `targets` are for towers that see them."""
        towers: Callable[..., HeadOutput] = self.towers
        seen = {} if targets is None else {"targets": targets}
        return towers(self.lead(features, valid), valid, **seen)

    @property
    def sees_targets(self) -> bool:
        """Whether the towers do."""
        return getattr(self.towers, "sees_targets", False)

    @property
    def routed(self) -> Head:
        """The towers: the part that may route, see `ChainedHead`."""
        return self.towers

    def lead(self, features: Sequence[Tensor], valid: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The attended maps, L x (B, C, H, W)."""
        return self.attention(features, valid).cls


def _one_branch(head: Callable[..., Head]) -> Callable[..., Head]:
    """Of the first head only the features for classification are read: no others are built, where there is a choice."""
    try:
        return with_branches(head, ["cls"])
    except UserError:
        return head  # one map for both
