"""Local ImageNet weights into a timm backbone."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dyndet.errors import UserError, reason
from dyndet.models.backbones.deformable import DeformConv
from dyndet.sealed import fault


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors or torch file, read without executing anything in it.

    Raises:
        UserError: if the file is missing, unreadable, or holds more than tensors.
    """
    if not path.is_file():
        raise UserError(f"no weight file at {path.resolve()}: set backbone.weights to a local file, 'timm' or 'none'")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path) and (found := fault(path)) is not None:
            raise RuntimeError(found)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} is not a file of plain tensors: {reason(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not tensors by name")
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


def load_backbone_weights(body: nn.Module, path: Path) -> None:
    """Fills a timm `features_only` model; classifier weights are left over, anything else must match.

    Only the offset convolutions of deformable stages may be missing from the file: ImageNet models have none.

    Raises:
        UserError: naming what is missing or left over.
    """
    weights = read_weights(path)
    if any(key.startswith("_conv_stem") for key in weights):
        weights = _from_efficientnet_lite(weights)
    weights = _as_features(weights, body)
    expected = body.state_dict()
    optional = [f"{name}.offset." for name, layer in body.named_modules() if isinstance(layer, DeformConv)]
    missing = [
        key
        for key in expected
        if key not in weights and not key.endswith("num_batches_tracked") and not key.startswith(tuple(optional))
    ]
    wrong = [key for key in expected if key in weights and weights[key].shape != expected[key].shape]
    if missing or wrong:
        raise UserError(
            f"{path} does not fit the backbone: {len(missing)} tensors missing ({', '.join(missing[:3])}), "
            f"{len(wrong)} of another shape ({', '.join(wrong[:3])}). Is it the weight file of this backbone.name?"
        )
    body.load_state_dict({key: weights.get(key, value) for key, value in expected.items()})


def _as_features(weights: dict[str, Tensor], body: nn.Module) -> dict[str, Tensor]:
    """Names of timm's whole model -> those of its `features_only` model, whose children are the single stages."""
    children = {name for name, _ in body.named_children()}
    prefix = "model." if children == {"model"} else ""
    renamed = {}
    for key, tensor in weights.items():
        first, _, rest = key.partition(".")
        index, _, tail = rest.partition(".")
        flat = f"{first}_{index}"
        renamed[f"{flat}.{tail}" if first not in children and flat in children else prefix + key] = tensor
    return renamed


def _from_efficientnet_lite(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Key names of the EfficientNet-Lite reference release -> timm `tf_efficientnet_lite*`."""
    first_stage = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    later = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    blocks = sorted({int(key.split(".")[1]) for key in weights if key.startswith("_blocks.")})
    place: dict[int, tuple[int, int]] = {}
    stage = index = 0
    for block in blocks:
        # A stage starts where the first stage (blocks without expansion) ends and wherever a block cannot be
        # residual: its input and output channels or its stride differ from the block before.
        if block and _starts_stage(weights, block):
            stage, index = stage + 1, 0
        place[block] = (stage, index)
        index += 1
    renamed = {}
    for key, tensor in weights.items():
        parts = key.split(".")
        if parts[0] == "_blocks":
            stage, index = place[int(parts[1])]
            names = first_stage if stage == 0 else later
            renamed[".".join(["blocks", str(stage), str(index), names[parts[2]], *parts[3:]])] = tensor
        else:
            renamed[".".join([outer[parts[0]], *parts[1:]])] = tensor
    return renamed


def _starts_stage(weights: dict[str, Tensor], block: int) -> bool:
    before = weights[f"_blocks.{block - 1}._project_conv.weight"].shape[0]
    here = weights[f"_blocks.{block}._project_conv.weight"].shape[0]
    return before != here
