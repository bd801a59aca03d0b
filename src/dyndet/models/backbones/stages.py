"""A backbone stage by stage: what a dynamic detector needs to feed one backbone's maps into another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

from timm.models.swin_transformer import SwinTransformerStage
from torch import Tensor, nn

from dyndet.errors import UserError
from dyndet.structures import Size


class Stage(NamedTuple):
    """One stage of a backbone, maps (B, C, H, W) to maps; between the two calls composite links may add to it."""

    enter: Callable[..., Tensor]
    body: Callable[[Tensor], Tensor]


class StagedBackbone(Protocol):
    """A backbone that can be run stage by stage.

    Attributes:
        channels: C of every returned map, finest first.
        strides: pixels per position of every returned map.
        stage_channels: C of every stage's output, the stem's first.
        stage_strides: pixels per position of these.
        link_channels: C of every stage between its two calls.
    """

    channels: list[int]
    strides: list[int]
    stage_channels: list[int]
    stage_strides: list[int]
    link_channels: list[int]

    def stages(self) -> list[Stage]:
        """The first one is called with (B, 3, H, W) images."""
        ...

    def drop_stages(self, count: int) -> None:
        """Forgets the leading stages, which then must not be run: another backbone's stand in for them."""
        ...

    def sources(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of all stages -> what links, routers and `maps` read."""
        ...

    def maps(self, sources: Sequence[Tensor], size: Size) -> list[Tensor]:
        """`sources` of images of this size -> the maps that a call of the backbone returns."""
        ...

    def __call__(self, images: Tensor) -> list[Tensor]: ...


def run_stages(stages: Sequence[Stage], x: Tensor) -> list[Tensor]:
    """The outputs of all stages, one after the other."""
    outputs = []
    for stage in stages:
        x = stage.body(stage.enter(x))
        outputs.append(x)
    return outputs


def timm_stages(body: Any) -> list[list[tuple[str, nn.Module]]]:
    """The modules of timm's feature extractor by stage, named from `body`; a stage ends where timm taps it.

    Of a Swin the patch embedding is a stage of its own.

    Raises:
        UserError: if its modules do not follow one another.
    """
    wrapped: Any = getattr(body, "model", None)  # ViTs, of which timm gives no parts
    blocks = getattr(body, "blocks", None)
    if isinstance(body, nn.ModuleDict) and wrapped is None:
        items = list(body.items())
    elif isinstance(blocks, nn.Sequential):  # EfficientNet, MobileNet
        items = [(name, layer) for name, layer in body.named_children() if name != "blocks"]
        items += [(f"blocks.{index}", block) for index, block in enumerate(blocks)]
    else:
        raise UserError(
            f"backbone {type(wrapped or body).__name__} cannot be run stage by stage, as a dynamic detector "
            "needs it: choose one such as resnet50, swin_tiny_patch4_window7_224 or efficientnet_b1"
        )
    infos = cast(Any, body.feature_info).info  # of timm
    ends = {name for info in infos for name in (info["module"], info["module"].replace(".", "_"))}
    stages: list[list[tuple[str, nn.Module]]] = [[]]
    for index, (name, layer) in enumerate(items):
        if index == 1 and isinstance(layer, SwinTransformerStage):
            stages.append([])
        stages[-1].append((name, layer))
        if name in ends and index < len(items) - 1:
            stages.append([])
    return stages


def drop_modules(body: nn.Module, names: Sequence[str]) -> None:
    """Replaces submodules by nothing."""
    for name in names:
        parent, _, child = name.rpartition(".")
        owner = body.get_submodule(parent)
        owner._modules[child] = nn.Identity()
