"""Which leading parts of a timm backbone do not train."""

from __future__ import annotations

from torch import nn

from dyndet.errors import UserError

_STAGES = ("layer", "stages", "blocks")
_CONTAINERS = ("layers", "stages", "blocks")


def freeze(body: nn.Module, stages: int) -> list[nn.Module]:
    """Stops the training of a backbone's leading parts.

    Args:
        body: timm's feature extractor.
        stages: as mmdetection counts them: -1 nothing, 0 the stem, 1 stem and first stage (detectron2's `FREEZE_AT` is
            one more). Every block of a ViT is a stage; its stem has the position embedding and the tokens that are no
            patches.

    Returns:
        The frozen modules, which belong in eval mode.

    Raises:
        UserError: where the backbone has fewer stages.
    """
    model = dict(body.named_children()).get("model", body)  # timm wraps a ViT, not its parts
    stem, rest = _split(model)
    if not -1 <= stages <= len(rest):
        raise UserError(
            f"backbone.frozen_stages={stages}: this backbone has {len(rest)} stages: set -1 to train everything, 0 to "
            f"freeze the stem, or 1 to {len(rest)} for that many stages as well"
        )
    if stages < 0:
        return []
    for parameter in model.parameters(recurse=False):
        parameter.requires_grad_(False)
    frozen = stem + rest[:stages]
    for module in frozen:
        module.requires_grad_(False)
    return frozen


def _split(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The children that make the stem, and the stages."""
    children = list(model.named_children())
    modules = [module for _, module in children]
    first = next((i for i, (name, _) in enumerate(children) if name.startswith(_STAGES)), 1)
    if first < len(children) and children[first][0] in _CONTAINERS:
        return modules[:first], list(modules[first].children())
    return modules[:first], modules[first:]
