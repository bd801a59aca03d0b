"""The backbones of YOLOv7, YOLOv7-X and YOLOv7-W6 (Wang et al., CVPR 2023, arXiv:2207.02696)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from dyndet.models.backbones.stages import Stage, run_stages
from dyndet.models.backbones.yolov7_blocks import ELAN, ConvNorm, SpaceToDepth, Transition, scaled, scaled_taps
from dyndet.structures import Size


class YoloBackbone(nn.Module):
    """A stem at stride 2, then stages that halve the resolution and go through an ELAN.

    Attributes:
        channels: C of every returned map, finest first.
        strides: pixels per position of every returned map.
        size_divisor: the largest stride; sides of images are multiples of it.
        stage_channels: C of every stage's output, the stem's first.
        stage_strides: pixels per position of these.
        link_channels: C of every stage after its entrance, where composite links add.

    Args:
        stem: channels of the stem's convolutions up to stride 2, (32, 64) for YOLOv7; one number stands for a single
            convolution on pixels rearranged to a quarter of the resolution (W6).
        stages: per stage the channels after its entrance, of the ELAN's branches, and of its output.
        taps: see `ELAN`.
        downsample: entrances from the second stage on: "pool" a `Transition`, "conv" a strided convolution.
        num_outputs: the coarsest so many stages are returned.
        width: factor on all channels.
        depth: factor on the length of the ELANs' chains.
    """

    def __init__(
        self,
        *,
        stem: Sequence[int],
        stages: Sequence[Sequence[int]],
        taps: Sequence[int] = (4, 2),
        downsample: Literal["pool", "conv"] = "pool",
        num_outputs: int = 3,
        width: float = 1.0,
        depth: float = 1.0,
    ) -> None:
        super().__init__()
        if downsample not in ("pool", "conv"):
            raise ValueError(f"downsample must be pool or conv, got {downsample!r}")
        before, after = scaled(stem[0], width), scaled(stem[-1], width)
        enter: nn.Module = SpaceToDepth()
        self.link_channels = [12]
        if len(stem) > 1:
            enter = nn.Sequential(ConvNorm(3, before, 3), ConvNorm(before, after, 3, 2))
            self.link_channels = [after]
        self.enters = nn.ModuleList([enter])
        self.bodies = nn.ModuleList([ConvNorm(self.link_channels[0], after, 3)])
        self.stage_channels = [after]
        for index, numbers in enumerate(stages):
            entered, branch, out = (scaled(number, width) for number in numbers)
            pool = downsample == "pool" and index > 0
            previous = self.stage_channels[-1]
            self.enters.append(Transition(previous, entered // 2) if pool else ConvNorm(previous, entered, 3, 2))
            chain = scaled_taps(taps, depth)
            self.bodies.append(ELAN(entered, out, width=branch, chain_width=branch, taps=chain))
            self.link_channels.append(entered)
            self.stage_channels.append(out)
        self.channels = self.stage_channels[-num_outputs:]
        self.stage_strides = [2 ** (index + 1) for index in range(len(self.stage_channels))]
        self.strides = self.stage_strides[-num_outputs:]
        self.size_divisor = self.strides[-1]

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W), H and W multiples of `size_divisor` -> L x (B, C_l, H / stride_l, W / stride_l)."""
        return run_stages(self.stages(), images)[-len(self.channels) :]

    def stages(self) -> list[Stage]:
        """As of `StagedBackbone`."""
        return [Stage(enter, body) for enter, body in zip(self.enters, self.bodies, strict=True)]

    def drop_stages(self, count: int) -> None:
        for index in range(count):
            self.enters[index], self.bodies[index] = nn.Identity(), nn.Identity()

    def sources(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        return list(outputs)

    def maps(self, sources: Sequence[Tensor], size: Size) -> list[Tensor]:
        return list(sources[-len(self.channels) :])
