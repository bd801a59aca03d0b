"""Composite links: one backbone's maps added to the stages of another (DHLC of CBNetV2).

Source: Liang et al., CBNetV2, TIP 2022, arXiv:2107.00420.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from dyndet.models.backbones.stages import StagedBackbone


class CompositeLinks(nn.Module):
    """x_l + sum over k >= l of up(link_kl(F_k)): every stage of the second backbone reads the first's deeper ones.

    Args:
        stage_channels: C of every stage's output of the first backbone.
        link_channels: C of every stage of the second where the links add.
        first: the first stage of the second backbone that reads.
        link: called with the `in_channels` of a source and the `out_channels` of the stages that read it, finest first;
            maps the source to one map for each.
    """

    def __init__(
        self,
        stage_channels: Sequence[int],
        link_channels: Sequence[int],
        *,
        first: int,
        link: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        self.first = first
        self.sources = nn.ModuleList(
            link(in_channels=stage_channels[k], out_channels=list(link_channels[first : k + 1]))
            for k in range(first, len(stage_channels))
        )

    def forward(self, sources: Sequence[Tensor]) -> list[list[Tensor]]:
        """Outputs of all stages -> per stage what is to be added to it, each at its source's resolution."""
        added: list[list[Tensor]] = [[] for _ in sources]
        for link, source in zip(self.sources, sources[self.first :], strict=True):
            for stage, x in enumerate(link(source), self.first):
                added[stage].append(x)
        return added


class JointLink(nn.Module):
    """One 1x1 convolution with bias for all stages that read a source (DynamicDet's YOLO).

    It starts at zero, so that a second backbone with trained weights starts as what it is.
    """

    def __init__(self, in_channels: int, out_channels: Sequence[int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, sum(out_channels), 1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        self.out_channels = list(out_channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> a map for every stage."""
        return list(self.conv(x).split(self.out_channels, 1))


class RandomLink(JointLink):
    """A `JointLink` that starts at random: as published, for two backbones that start at random as well."""

    def __init__(self, in_channels: int, out_channels: Sequence[int]) -> None:
        super().__init__(in_channels, out_channels)
        self.conv.reset_parameters()


class NormLink(nn.Module):
    """A 1x1 convolution and batch norm for each stage that reads a source; starts at zero (CBNetV2's ResNets).

    The running statistics stay as they are, also in training.
    """

    def __init__(self, in_channels: int, out_channels: Sequence[int]) -> None:
        super().__init__()
        self.links = nn.ModuleList(
            nn.Sequential(nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
            for channels in out_channels
        )
        for _, norm in self.links:  # type: ignore[misc]
            nn.init.zeros_(norm.weight)

    def train(self, mode: bool = True) -> NormLink:
        super().train(mode)
        for _, norm in self.links:  # type: ignore[misc]
            norm.eval()
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> a map for every stage."""
        return [link(x) for link in self.links]


class ResidualLink(nn.Module):
    """The source itself for its own stage, a 1x1 convolution that starts at zero for the others (CBNetV2's Swin)."""

    def __init__(self, in_channels: int, out_channels: Sequence[int]) -> None:
        super().__init__()
        if out_channels[-1] != in_channels:
            raise ValueError(
                f"a residual link adds {in_channels} channels to a stage of {out_channels[-1]}: "
                "use NormLink or JointLink with this backbone"
            )
        self.convs = nn.ModuleList(nn.Conv2d(in_channels, channels, 1) for channels in out_channels[:-1])
        for conv in self.convs:
            nn.init.zeros_(conv.weight)  # type: ignore[arg-type]
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> a map for every stage."""
        return [*(conv(x) for conv in self.convs), x]


def run_linked(
    backbone: StagedBackbone,
    images: Tensor,
    first: Sequence[Tensor],
    added: Sequence[Sequence[Tensor]],
    *,
    shared: int = 0,
    cross: int | None = None,
) -> list[Tensor]:
    """Runs the second backbone of a dynamic detector.

    Args:
        backbone: the second one.
        images: (B, 3, H, W) network input.
        first: outputs of all stages of the first backbone.
        added: from `CompositeLinks`.
        shared: the second backbone has so many leading stages less and goes on from the first's.
        cross: the entrance of this stage also reads the first backbone's stage before it: in the released
            Dy-YOLOv7-X the convolutions of the first `Transition` do.

    Returns:
        The outputs of all stages, the shared ones included.
    """
    outputs = list(first[:shared])
    x = outputs[-1] if shared else images
    for index, stage in enumerate(backbone.stages()):
        if index < shared:
            continue
        x = stage.enter(x, first[index - 1]) if index == cross else stage.enter(x)
        for more in added[index]:
            x = x + F.interpolate(more, size=x.shape[-2:], mode="nearest")
        x = stage.body(x)
        outputs.append(x)
    return outputs
