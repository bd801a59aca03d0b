"""What a detector is, and what its parts are: everything outside the models relies on this page alone.

Dynamic heads may offer more than `Head`: `GatedHead`, `TwinnedHead`, and `SwitchableHead`, whose sparse operations have
several executions. Commands ask for these, never for a class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dyndet.models.budget import Budget
from dyndet.models.preprocess import Preprocess
from dyndet.ops.sparse.backend import SwitchableHead
from dyndet.routing import Routes, Routing
from dyndet.structures import Detections, HeadOutput, ImageBatch, Losses, Target

__all__ = [
    "Branch",
    "ChainedHead",
    "Detector",
    "FeatureMaps",
    "GatedHead",
    "Head",
    "Images",
    "Predictor",
    "RawMaps",
    "SwitchableHead",
    "TwinnedHead",
    "routed_part",
]

RawMaps = list[dict[str, Tensor]]
"""Per level, the predictor's maps by name."""

Branch = Literal["cls", "reg"]
"""What of a head's output there is: features for classification, for regression."""

Images = ImageBatch | Tensor | Sequence[Tensor]
"""A batch; (B, 3, H, W); or single (3, H, W) images of any sizes. RGB, uint8 0..255 or float 0..1."""


class FeatureMaps(Protocol):
    """What a backbone and a neck are: a call to feature maps, finest first, of known widths and strides.

    Those that do not take images of any size have a `size_divisor`: both sides must be multiples of it.
    """

    strides: list[int]

    @property
    def channels(self) -> int | list[int]:
        """C of every map, or one number for all."""
        ...

    def __call__(self, inputs: Any) -> list[Tensor]: ...


class Head(Protocol):
    """Any head family.

    Its constructor takes `branches`, the ones to build and run; without, it fits only predictors that read all.
    In training one with `sees_targets = True` is also given `targets=`: per image, no crowd, in pixels of the batch.
    """

    def __call__(self, features: Sequence[Tensor], valid: Sequence[Tensor] | None = None) -> HeadOutput: ...


@runtime_checkable
class GatedHead(Protocol):
    """A head with gates that a threshold closes: one trained head at many speeds."""

    @property
    def gate_threshold(self) -> float:
        """Gates that are open less than this, or just so, close; 0 leaves them as they learned."""
        ...

    def close_below(self, threshold: float) -> None:
        """Sets `gate_threshold`, which lies between 0 and 1."""
        ...


@runtime_checkable
class TwinnedHead(Protocol):
    """A head that knows its fixed twin: without gates, otherwise the same, to compare its time with."""

    def fixed_twin(self) -> nn.Module:
        """Takes what the head takes; in eval mode."""
        ...


@runtime_checkable
class ChainedHead(Protocol):
    """A head that ends with another one, the only part of it that may route: `dyndet.models.heads.chain.HeadChain`."""

    @property
    def routed(self) -> Head:
        """The last part."""
        ...

    def lead(self, features: Sequence[Tensor], valid: Sequence[Tensor] | None = None) -> list[Tensor]:
        """What the last part is given."""
        ...


def routed_part(head: Head) -> Head:
    """The part that may route: of a chain its last one, otherwise the head itself."""
    while isinstance(head, ChainedHead):
        head = head.routed
    return head


class Predictor(Protocol):
    """Any dense predictor: the last convolutions, the losses and the decoding.

    Attributes:
        reads: what of a `HeadOutput` it takes, a constant of its class; heads are built with these branches only.

    It may have `positive_shares`, with the arguments of `losses`: the (L,) share of every level's positions that its
    assigner makes positive, for budgets that ask.
    """

    reads: tuple[Branch, ...]

    def __call__(self, head: HeadOutput) -> RawMaps: ...

    def losses(
        self, raw: RawMaps, targets: Sequence[Target], valid: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]: ...

    def detections(
        self, raw: RawMaps, images: ImageBatch, valid: Sequence[Tensor] | None = None
    ) -> list[Detections]: ...


class Detector(nn.Module, ABC):
    """Images in, losses or detections out; no method returns different types by mode.

    Attributes:
        preprocess: pixels to network input.
        budget: prices routing in `losses`; None leaves it free.
    """

    preprocess: Preprocess
    budget: Budget | None

    @property
    @abstractmethod
    def strides(self) -> list[int]:
        """Pixels per position of every level."""

    @property
    def size_divisor(self) -> int:
        """Network inputs have sides that are multiples of this; 1 takes any."""
        return 1

    @property
    def has_masks(self) -> bool:
        """Whether detections carry masks, and targets must for training."""
        return False

    @abstractmethod
    def losses(self, images: Images, targets: Sequence[Target | dict[str, Tensor]]) -> Losses:
        """Detection losses and, where something was routed, the budget; call it in training mode.

        Args:
            images: see `Images`.
            targets: per image, boxes in pixels of `images`; a `Target`, or torchvision's dict: `boxes` (N, 4) xyxy,
                `labels` (N,) 0..K-1, where there are some `iscrowd` (N,) and `masks` (N, H, W).

        Raises:
            UserError: on images or targets that are not so, see `dyndet.inputs`.
        """

    @abstractmethod
    def detect_with_routing(self, images: Images) -> tuple[list[Detections], Routing | Routes | None]:
        """Detections per image, in pixels of the original images, and what was decided on the way; in eval mode."""

    @abstractmethod
    def raw_outputs(self, images: Images) -> RawMaps:
        """The predictor's maps per level before decoding (for FCOS `cls`, `box`, `centerness`)."""

    def forward(self, images: Images) -> RawMaps:
        """`raw_outputs`, with all that may run beside: the pass whose multiply-adds are counted."""
        return self.raw_outputs(images)

    def parts(self) -> dict[str, nn.Module]:
        """What multiply-adds are counted for, by name, in the order of a pass; the head is called "head"."""
        return {name: part for name, part in self.named_children() if name not in ("preprocess", "budget")}

    @torch.no_grad()
    def detect(self, images: Images) -> list[Detections]:
        """Detections per image, in pixels of the original images; call it in eval mode.

        Raises:
            UserError: on images that are not `Images`, see `dyndet.inputs`.
        """
        return self.detect_with_routing(images)[0]
