"""DyHead: scale-, spatial- and task-aware attention over a pyramid.

Source: Dai et al., Dynamic Head, CVPR 2021, arXiv:2106.08322, in the order of the released code (spatial, scale, task;
the paper draws scale first), where each level sees its two neighbours.
Legend: B images, C channels, L levels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dyndet.errors import UserError
from dyndet.models.detectors.base import Branch
from dyndet.models.heads.attention import ScaleAttention, TaskAttention
from dyndet.models.heads.branches import BRANCHES, check_branches
from dyndet.models.heads.init import check_groups
from dyndet.ops.deform_conv import modulated_deform_conv
from dyndet.ops.masked_norm import masked_group_norm
from dyndet.structures import HeadOutput

HighOffset = Literal["prefix", "resize", "upsample_first"]
Init = Literal["normal", "default"]
Sampling = tuple[Tensor, Tensor]
"""Offsets (B, 18, H, W) and modulation (B, 9, H, W) of a deformable 3x3 convolution."""


class SpatialConv(nn.Module):
    """3x3 convolution, deformable where it is given offsets, and GroupNorm."""

    def __init__(self, channels: int, *, stride: int, bias: bool, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)  # torch's own for a convolution
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        self.norm = nn.GroupNorm(groups, channels)
        self.stride = stride

    def forward(self, x: Tensor, sampling: Sampling | None) -> Tensor:
        """(B, C, H, W) -> (B, C, ceil(H / stride), ceil(W / stride)), not yet normalised."""
        if sampling is None:
            # In the precision of its weights, as the deformable one: no autocast does it here.
            return F.conv2d(x.to(self.weight.dtype), self.weight, self.bias, stride=self.stride, padding=1)
        return modulated_deform_conv(x, *sampling, self.weight, self.bias, stride=self.stride)

    def normalise(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """GroupNorm over the valid positions."""
        return masked_group_norm(
            x, self.norm.num_groups, self.norm.weight.to(x), self.norm.bias.to(x), mask=valid, eps=self.norm.eps
        )


class DyHeadBlock(nn.Module):
    """One block, shared by all levels; the arguments are those of `DyHead`.

    F_i: GroupNorm(deformable conv) of the level itself, of the finer one (stride 2) and of the coarser one (enlarged);
    y = mean over i of scale(F_i) F_i; output = task(y).
    """

    def __init__(
        self,
        channels: int,
        *,
        high_offset: HighOffset,
        zero_init_offset: bool,
        init: Init,
        dcn_bias: bool,
        gn_groups: int,
        spatial: bool,
        scale: bool,
        task: bool,
    ) -> None:
        super().__init__()
        self.offset = nn.Conv2d(channels, 27, 3, padding=1) if spatial else None
        if self.offset is not None:
            _init_offset(self.offset, zero=zero_init_offset, init=init)
        self.mid, self.low, self.high = (
            SpatialConv(channels, stride=stride, bias=dcn_bias, groups=gn_groups) for stride in (1, 2, 1)
        )
        self.scale = ScaleAttention(channels) if scale else None
        self.task = TaskAttention(channels, init=init) if task else None
        self.high_offset: HighOffset = high_offset

    def forward(self, features: Sequence[Tensor], valid: Sequence[Tensor | None]) -> list[Tensor]:
        """L x (B, C, H, W), finest first -> the same shapes. Every level reads the block's inputs."""
        return [self._level(features, valid, level).to(features[level].dtype) for level in range(len(features))]

    def _level(self, features: Sequence[Tensor], valid: Sequence[Tensor | None], level: int) -> Tensor:
        area = valid[level]
        size = features[level].shape[-2:]
        with _exact(features[level]):
            sampling = self._sampling(features[level])
            maps = [self.mid.normalise(self.mid(features[level], sampling), area)]
            if level > 0:
                maps.append(self.low.normalise(self.low(features[level - 1], sampling), area))
            if level < len(features) - 1:
                coarser = features[level + 1]
                if self.high_offset == "upsample_first":
                    up = self.high(_upsample(coarser, size), sampling)
                    maps.append(self.high.normalise(up, area))
                else:
                    there = self._sampling_above(sampling, (coarser.shape[-2], coarser.shape[-1]))
                    above = self.high.normalise(self.high(coarser, there), valid[level + 1])
                    maps.append(_upsample(above, size))
        weighted = maps if self.scale is None else [self.scale(x, area) * x for x in maps]
        y = functools.reduce(torch.add, weighted) / len(weighted)
        y = F.relu(y) if self.task is None else self.task(y, area)
        return y if area is None else y * area

    def _sampling(self, x: Tensor) -> Sampling | None:
        if self.offset is None:
            return None
        predicted = self.offset(x.to(self.offset.weight.dtype))
        if predicted.dtype != torch.float64:
            predicted = predicted.float()  # half precision is coarse for places
        return predicted[:, :18], predicted[:, 18:].sigmoid()

    def _sampling_above(self, sampling: Sampling | None, size: tuple[int, int]) -> Sampling | None:
        """The sampling that was predicted on a level, for the coarser level of this size."""
        if sampling is None:
            return None
        offset, mask = sampling
        if self.high_offset == "prefix":
            return _prefix(offset, size), _prefix(mask, size)
        # A position of the coarser level is two of this one.
        return 0.5 * _resize(offset, size), _resize(mask, size)


class DyHead(nn.Module):
    """A stack of attention blocks; classification and regression read the same maps.

    On padding its outputs are zero, and norms and poolings do not see it; only the upsampling of a coarser level
    still depends on how far an image was padded.

    Args:
        channels: C of the pyramid, a multiple of 4 and of `gn_groups`.
        num_blocks: blocks in sequence (6 in the papers), each with its own weights.
        high_offset: how the coarser level is sampled, whose offsets are predicted on this one. "prefix": as released
            weights need it, the first values of the larger buffer, whatever they were predicted for; "resize":
            resized to the coarser level and halved; "upsample_first": the coarser level is enlarged before the
            convolution, for half as much compute again.
        zero_init_offset: offsets start at 0, so that sampling starts on the grid; otherwise as `init` says.
        init: of the offsets and the task attention: "normal" (std 0.01, bias 0) or "default" (torch's).
        dcn_bias: deformable convolutions have a bias.
        gn_groups: groups of every GroupNorm.
        spatial: False makes the convolutions ordinary ones.
        scale: False weighs all levels alike.
        task: False is an ordinary ReLU.
        checkpointing: keep only the blocks' inputs for the backward pass and compute the rest twice.
        ignore_padding: norms and poolings see the valid positions only; False as published.
        branches: under which names the maps go on; they are the same.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_blocks: int = 6,
        high_offset: HighOffset = "resize",
        zero_init_offset: bool = True,
        init: Init = "normal",
        dcn_bias: bool = False,
        gn_groups: int = 16,
        spatial: bool = True,
        scale: bool = True,
        task: bool = True,
        checkpointing: bool = False,
        ignore_padding: bool = True,
        branches: Sequence[Branch] = BRANCHES,
    ) -> None:
        super().__init__()
        for key, value, allowed in (
            ("high_offset", high_offset, ("prefix", "resize", "upsample_first")),
            ("init", init, ("normal", "default")),
        ):
            if value not in allowed:
                raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {value!r}")
        check_groups(channels, gn_groups, "gn_groups")
        if channels % 4:
            raise ValueError(f"the channels of the neck must be a multiple of 4, got {channels}")
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.blocks = nn.ModuleList(
            DyHeadBlock(
                channels,
                high_offset=high_offset,
                zero_init_offset=zero_init_offset,
                init=init,
                dcn_bias=dcn_bias,
                gn_groups=gn_groups,
                spatial=spatial,
                scale=scale,
                task=task,
            )
            for _ in range(num_blocks)
        )
        self.checkpointing = checkpointing
        self.ignore_padding = ignore_padding
        self.branches = check_branches(branches)

    def forward(self, features: Sequence[Tensor], valid: Sequence[Tensor] | None = None) -> HeadOutput:
        """Attends to a pyramid.

        Args:
            features: L x (B, C, H, W), finest first, each level half as large as the one before (rounded up).
            valid: L x (B, 1, H, W) bool, False on padding; None when there is none.

        Returns:
            The same maps for every branch, in the shapes of the input.

        Raises:
            UserError: if the levels do not halve.
        """
        _check_halving(features)
        areas: Sequence[Tensor | None] = valid if valid and self.ignore_padding else [None] * len(features)
        maps = [x if area is None else x * area for x, area in zip(features, areas, strict=True)]
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                maps = cast(list[Tensor], checkpoint(block, maps, areas, use_reentrant=False, preserve_rng_state=False))
            else:
                maps = block(maps, areas)
        return HeadOutput.of(dict.fromkeys(self.branches, maps))


def _init_offset(conv: nn.Conv2d, *, zero: bool, init: Init) -> None:
    if zero:
        nn.init.zeros_(conv.weight)
    elif init == "normal":
        nn.init.normal_(conv.weight, std=0.01)
    if (zero or init == "normal") and conv.bias is not None:
        nn.init.zeros_(conv.bias)


def _exact(x: Tensor) -> AbstractContextManager[object]:
    """No autocast: offsets are places, and norms need float32."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _prefix(values: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, D, H, W) -> the first D h w values of each image, read as (B, D, h, w)."""
    height, width = size
    return values.flatten(1)[:, : values.shape[1] * height * width].unflatten(1, (-1, height, width))


def _resize(values: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(values, size=list(size), mode="bilinear", align_corners=True)


_upsample = _resize


def _check_halving(features: Sequence[Tensor]) -> None:
    for finer, coarser in pairwise(features):
        expected = [-(-side // 2) for side in finer.shape[-2:]]
        if list(coarser.shape[-2:]) != expected:
            raise UserError(
                f"DyHead needs levels that halve: {tuple(finer.shape[-2:])} is followed by "
                f"{tuple(coarser.shape[-2:])}, not by {tuple(expected)}; give it consecutive powers of two as strides"
            )
