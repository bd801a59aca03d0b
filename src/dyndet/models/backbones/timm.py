"""Any timm model as a feature pyramid."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dyndet.errors import UserError, reason
from dyndet.models.backbones.deformable import deform_stages
from dyndet.models.backbones.freeze import freeze
from dyndet.models.backbones.stages import Stage, drop_modules, timm_stages
from dyndet.models.backbones.swin import ANY_SIZE, is_swin, pad_windows
from dyndet.models.backbones.weights import load_backbone_weights
from dyndet.structures import Size


class TimmBackbone(nn.Module):
    """Feature maps of a timm model at given strides.

    A plain ViT has one map, that of its last block without the final norm, at the stride of its patches. Images that
    fill no whole number of patches are padded; its position embedding is resampled to theirs.

    Attributes:
        channels: C of every map, finest first.
        strides: pixels per position of every map.

    It is a `StagedBackbone` as well, if timm's model is a chain of modules.

    Args:
        name: timm model name, e.g. "resnet50".
        strides: which maps to return.
        weights: "none" (random), "timm" (timm's pretrained weights, downloaded or from its cache) or a local file
            (.pth or .safetensors, in timm's naming or that of the EfficientNet-Lite reference).
        frozen_stages: what does not train: -1 nothing, 0 the stem, 1 stem and first stage and so on, see `freeze`.
        norm: batch norm layers: "train" as usual; "eval" keeps the running statistics and trains scale and shift;
            "frozen" keeps both.
        stride_in_1x1: move a bottleneck's stride from the 3x3 to the first 1x1 convolution (the MSRA/Caffe ResNets).
        deformable_stages: stages of a ResNet or ResNeXt, 2 to 5 for c2 to c5, whose 3x3 convolutions are modulated
            deformable ones (DCN v2). Weight files need not hold their offset convolutions, which start at zero.
        drop_path: stochastic depth: the rate of the last block, growing linearly from 0 at the first.
        output_norm: a layer norm over the channels of every returned map (as detectors use Swin).
        model_args: more arguments of timm's model, for instance {"channels": [32, 64, 128, 256]} for a narrow ResNet.

    Raises:
        UserError: on a model that timm does not know, a stride or a part that it does not have, or weights that do not
            fit.
    """

    def __init__(
        self,
        name: str,
        *,
        strides: Sequence[int] = (8, 16, 32),
        weights: str | Path = "none",
        frozen_stages: int = -1,
        norm: Literal["train", "eval", "frozen"] = "frozen",
        stride_in_1x1: bool = False,
        deformable_stages: Sequence[int] = (),
        drop_path: float = 0.0,
        output_norm: bool = False,
        model_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if norm not in ("train", "eval", "frozen"):
            raise ValueError(f"norm must be train, eval or frozen, got {norm!r}")
        if ":" in name:  # a scheme of timm's: a hub, a folder
            raise UserError(f"backbone.name={name} is no model of timm: give its name, and backbone.weights=FILE")
        shell, options = _shell(name, drop_path, model_args or {})
        taps: list[int] = list(shell.feature_info.out_indices)
        available: list[int] = list(shell.feature_info.reduction())
        missing = [stride for stride in strides if stride not in available]
        if missing:
            one = f"={available[-1:]} and neck=simple_pyramid" if len(set(available)) == 1 else ""
            found = sorted(set(available))
            raise UserError(f"backbone {name} has strides {found}, not {missing}: set backbone.strides{one}")
        last = {stride: index for index, stride in enumerate(available)}  # the deepest of several
        indices = tuple(taps[last[stride]] for stride in strides)
        self.body = _create(name, out_indices=indices, pretrained=str(weights) == "timm", **options)
        info: Any = self.body.feature_info
        self.channels: list[int] = list(info.channels())
        self.strides: list[int] = list(strides)
        self.channels_last = "NHWC" in str(getattr(self.body, "output_fmt", ""))  # Swin
        self.norm = norm
        self.divisor = _divisor(name, shell, [(last[stride], stride) for stride in strides])
        if is_swin(self.body):
            pad_windows(self.body)
        if stride_in_1x1:
            _move_strides(self.body)
        deform_stages(self.body, deformable_stages)
        if str(weights) not in ("none", "timm"):
            load_backbone_weights(self.body, Path(weights))
        self.frozen = freeze(self.body, frozen_stages)
        if norm == "frozen":
            for layer in self._norms():
                layer.requires_grad_(False)
        self.output_norm = nn.ModuleList(nn.LayerNorm(c) for c in self.channels) if output_norm else None

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) normalised images -> L x (B, C_l, ceil(H / stride_l), ceil(W / stride_l))."""
        height, width = images.shape[-2:]
        maps = self.body(self._padded(images))
        return self._cropped([self._finished(x, index) for index, x in enumerate(maps)], (height, width))

    @property
    def stage_channels(self) -> list[int]:
        return [channels for channels, _ in self._stage_numbers()]

    @property
    def stage_strides(self) -> list[int]:
        return [stride for _, stride in self._stage_numbers()]

    @property
    def link_channels(self) -> list[int]:
        channels = self.stage_channels
        return channels if is_swin(self.body) else [3, *channels[:-1]]

    def stages(self) -> list[Stage]:
        """As of `StagedBackbone`. Links add to a stage's input, after its halving in Swin and max pooling."""
        halving = is_swin(self.body)
        stages = []
        for index, modules in enumerate(timm_stages(self.body)):
            layers = [layer for _, layer in modules]
            if index == 0:
                stages.append(Stage(self._padded, partial(self._run, layers, first=True)))
            elif halving:
                block: Any = layers[0]
                stages.append(Stage(partial(self._run, [block.downsample]), partial(self._run, [block.blocks])))
            else:
                pools = int(isinstance(layers[0], nn.MaxPool2d))
                stages.append(Stage(partial(self._run, layers[:pools]), partial(self._run, layers[pools:])))
        return stages

    def drop_stages(self, count: int) -> None:
        drop_modules(self.body, [name for stage in timm_stages(self.body)[:count] for name, _ in stage])

    def sources(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of all stages, those that are returned with their norm."""
        if self.output_norm is None:
            return list(outputs)
        returned = self._returned()
        return [self._normed(x, returned.index(index)) if index in returned else x for index, x in enumerate(outputs)]

    def maps(self, sources: Sequence[Tensor], size: Size) -> list[Tensor]:
        return self._cropped([sources[index] for index in self._returned()], size)

    def _stage_numbers(self) -> list[tuple[int, int]]:
        """C and stride of every stage's output."""
        info: Any = self.body.feature_info
        numbers = [(item["num_chs"], item["reduction"]) for item in info.info]
        stages = len(timm_stages(self.body))
        return [numbers[0], *numbers][:stages] if is_swin(self.body) else numbers[:stages]

    def _returned(self) -> list[int]:
        """The stage that each returned map comes from: the last at its stride."""
        strides = self.stage_strides
        return [len(strides) - 1 - strides[::-1].index(stride) for stride in self.strides]

    def _padded(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if self.divisor == 1:
            return images
        return F.pad(images, (0, -width % self.divisor, 0, -height % self.divisor))

    def _run(self, layers: Sequence[nn.Module], x: Tensor, *, first: bool = False) -> Tensor:
        """Layers one after the other, (B, C, H, W) in and out."""
        if self.channels_last and not first:
            x = x.permute(0, 2, 3, 1)
        for layer in layers:
            x = layer(x)
        return x.permute(0, 3, 1, 2) if self.channels_last else x

    def _finished(self, x: Tensor, index: int) -> Tensor:
        """What timm returns as map `index` -> (B, C, H, W), normed."""
        return self._normed(x.permute(0, 3, 1, 2) if self.channels_last else x, index)

    def _normed(self, x: Tensor, index: int) -> Tensor:
        if self.output_norm is None:
            return x
        return self.output_norm[index](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _cropped(self, maps: Sequence[Tensor], size: Size) -> list[Tensor]:
        """Maps of padded images -> of the images."""
        return [x[..., : -(-size[0] // s), : -(-size[1] // s)] for x, s in zip(maps, self.strides, strict=True)]

    def train(self, mode: bool = True) -> TimmBackbone:
        super().train(mode)
        for module in self.frozen:
            module.eval()
        if self.norm != "train":
            for layer in self._norms():
                layer.eval()
        return self

    def _norms(self) -> list[_BatchNorm]:
        return [layer for layer in self.body.modules() if isinstance(layer, _BatchNorm)]


def _create(name: str, **kwargs: Any) -> nn.Module:
    try:
        return timm.create_model(name, features_only=True, **kwargs)
    except RuntimeError as error:
        if "Unknown model" not in str(error):
            raise UserError(
                f"timm could not build backbone {name} ({error}). If it tried to download weights without a network, "
                "set backbone.weights=none or to a local file."
            ) from error
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.4))
        raise UserError(f"timm has no model {name!r}: set backbone.name, perhaps to {near}") from error
    except OSError as error:
        raise UserError(
            f"the pretrained weights of {name} could not be downloaded ({type(error).__name__}). Set "
            "backbone.weights=FILE to a local copy, or backbone.weights=none to start from random weights."
        ) from error


def _shell(name: str, drop_path: float, more: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model without weights, and what timm is to be asked for besides its name."""
    options: dict[str, Any] = {**more, "drop_path_rate": drop_path}
    with torch.device("meta"):
        try:
            shell = _create(name, pretrained=False, **options)
        except TypeError as error:
            if "drop_path_rate" not in str(error):
                if more:
                    raise UserError(f"backbone.model_args={dict(more)} does not fit {name}: {error}") from error
                raise
            if drop_path:
                raise UserError(f"backbone {name} has no stochastic depth: set backbone.drop_path=0") from error
            options = dict(more)
            shell = _create(name, pretrained=False, **options)
        if _is_vit(shell):
            options |= {"dynamic_img_size": True}
            shell = _create(name, pretrained=False, **options)
    return shell, options | (ANY_SIZE if is_swin(shell) else {})


def _is_vit(body: nn.Module) -> bool:
    """Whether it is one of timm's ViTs that can resample their position embedding to the image."""
    return hasattr(getattr(body, "model", None), "dynamic_img_size")


def _divisor(name: str, shell: nn.Module, taken: Sequence[tuple[int, int]]) -> int:
    """What the sides of images must be multiples of, so that the maps `taken` (index, stride) have ceil(side / stride).

    Raises:
        UserError: where they have other sizes even so, or the model takes no images of any size.
    """
    if is_swin(shell):
        return 1
    coarsest = max(stride for _, stride in taken)
    with suppress(Exception):  # what models raise at sizes that they do not like is theirs to choose
        if _right_sizes(shell, 3 * coarsest + 1, taken):
            return 1
    side = 4 * coarsest
    try:
        right = _right_sizes(shell, side, taken)
    except Exception as error:
        raise UserError(f"backbone {name} takes no images of {side} x {side} pixels: {reason(error)}") from error
    if not right:
        raise UserError(f"backbone {name} does not halve its maps as its strides say: it cannot feed a pyramid")
    return coarsest


@torch.no_grad()
def _right_sizes(shell: nn.Module, side: int, taken: Sequence[tuple[int, int]]) -> bool:
    """Whether the maps of a square image have their promised sizes."""
    maps = shell.eval()(torch.empty(1, 3, side, side, device="meta"))
    rows = 1 if "NHWC" in str(getattr(shell, "output_fmt", "")) else 2
    return all(list(maps[index].shape[rows : rows + 2]) == [-(-side // stride)] * 2 for index, stride in taken)


def _move_strides(body: nn.Module) -> None:
    moved = 0
    for block in body.modules():
        conv1, conv2 = getattr(block, "conv1", None), getattr(block, "conv2", None)
        if not (isinstance(conv1, nn.Conv2d) and isinstance(conv2, nn.Conv2d)):
            continue
        if conv1.kernel_size == (1, 1) and conv2.stride == (2, 2):
            conv1.stride, conv2.stride = (2, 2), (1, 1)
            moved += 1
    if not moved:
        raise UserError("backbone.stride_in_1x1 needs a ResNet with bottleneck blocks")
