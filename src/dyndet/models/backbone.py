"""Any timm model as a feature pyramid."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dyndet.errors import UserError
from dyndet.models.weights import load_backbone_weights


class TimmBackbone(nn.Module):
    """Feature maps of a timm model at the wanted strides.

    Attributes:
        channels: C of every map, finest first.
        strides: pixels per position of every map.

    Args:
        name: timm model name, e.g. "resnet50".
        strides: which maps to return.
        weights: "none" (random), "timm" (timm's pretrained weights, downloaded or from its cache) or a local file
            (.pth or .safetensors, in timm's naming or that of the EfficientNet-Lite reference).
        frozen_stages: how many leading stages do not train (1: the stem, 2: stem and first stage, 0: everything
            trains).
        norm: batch norm layers: "train" as usual; "eval" keeps the running statistics and trains scale and shift;
            "frozen" keeps both.
        stride_in_1x1: move a bottleneck's stride from the 3x3 to the first 1x1 convolution (the MSRA/Caffe ResNets).

    Raises:
        UserError: on a model that timm does not know, a stride it does not have, or weights that do not fit.
    """

    def __init__(
        self,
        name: str,
        *,
        strides: Sequence[int] = (8, 16, 32),
        weights: str | Path = "none",
        frozen_stages: int = 0,
        norm: Literal["train", "eval", "frozen"] = "frozen",
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        if norm not in ("train", "eval", "frozen"):
            raise ValueError(f"norm must be train, eval or frozen, got {norm!r}")
        available = _feature_strides(name)
        missing = [stride for stride in strides if stride not in available]
        if missing:
            raise UserError(f"backbone {name} has strides {available}, not {missing}: set backbone.strides")
        indices = tuple(available.index(stride) for stride in strides)
        self.body = _create(name, features_only=True, out_indices=indices, pretrained=str(weights) == "timm")
        info: Any = self.body.feature_info
        self.channels: list[int] = list(info.channels())
        self.strides: list[int] = list(strides)
        self.channels_last = "NHWC" in str(getattr(self.body, "output_fmt", ""))  # Swin
        self.norm = norm
        if stride_in_1x1:
            _move_strides(self.body)
        if str(weights) not in ("none", "timm"):
            load_backbone_weights(self.body, Path(weights))
        self.frozen = _leading_modules(self.body, frozen_stages)
        for module in self.frozen:
            module.requires_grad_(False)
        if norm == "frozen":
            for layer in self._norms():
                layer.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) normalised images -> L x (B, C_l, ceil(H / stride_l), ceil(W / stride_l))."""
        maps = list(self.body(images))
        return [x.permute(0, 3, 1, 2) for x in maps] if self.channels_last else maps

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
        return timm.create_model(name, **kwargs)
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


def _feature_strides(name: str) -> list[int]:
    with torch.device("meta"):
        model = _create(name, features_only=True, pretrained=False)
    info: Any = model.feature_info
    return list(info.reduction())


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


def _leading_modules(body: nn.Module, stages: int) -> list[nn.Module]:
    """The children up to and including the given number of stages; a stage ends where resolution drops."""
    if stages == 0:
        return []
    children = list(body.named_children())
    starts = [i for i, (name, _) in enumerate(children) if name.startswith(("layer", "stages", "blocks"))]
    if len(starts) == 1:  # EfficientNet keeps its stages in one container
        container = children[starts[0]][1]
        return [module for _, module in children[: starts[0]]] + list(container.children())[: stages - 1]
    stem = starts[0] if starts else 1
    return [module for _, module in children[: stem + stages - 1]]
