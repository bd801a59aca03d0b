"""What the configuration in a checkpoint may name: a file of plain data must not choose what code runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dyndet.errors import UserError

CONSTRUCTORS = frozenset(
    {
        "dyndet.data.affine.RandomAffine",
        "dyndet.data.coco.CocoDataset",
        "dyndet.data.datamodule.DetectionDataModule",
        "dyndet.data.hsv.Hsv",
        "dyndet.data.layouts.folder.DataFolder",
        "dyndet.data.layouts.folder.read_part",
        "dyndet.data.letterbox.Letterbox",
        "dyndet.data.mixup.MixUp",
        "dyndet.data.mosaic.Mosaic",
        "dyndet.data.paste.PasteObjects",
        "dyndet.data.photometric.Photometric",
        "dyndet.data.shapes.ShapesDataset",
        "dyndet.data.transforms.Compose",
        "dyndet.data.transforms.DropMasks",
        "dyndet.data.transforms.RandomHorizontalFlip",
        "dyndet.data.transforms.Resize",
        "dyndet.data.transforms.ResizeShortestEdge",
        "dyndet.data.transforms.resizing",
        "dyndet.data.voc.VocDataset",
        "dyndet.data.yolo.YoloDataset",
        "dyndet.models.backbones.timm.TimmBackbone",
        "dyndet.models.budget.Budget",
        "dyndet.models.dynamicdet.links.JointLink",
        "dyndet.models.dynamicdet.links.NormLink",
        "dyndet.models.dynamicdet.links.RandomLink",
        "dyndet.models.dynamicdet.links.ResidualLink",
        "dyndet.models.dynamicdet.router.Router",
        "dyndet.models.detectors.dynamic.assemble_dynamic",
        "dyndet.models.detectors.dense.assemble_dense",
        "dyndet.models.detectors.two_stage.assemble_two_stage",
        "dyndet.models.heads.chain.HeadChain",
        "dyndet.models.heads.dyhead.DyHead",
        "dyndet.models.heads.fine_grained.FineGrainedHead",
        "dyndet.models.heads.fixed.FixedHead",
        "dyndet.models.heads.gates.RestrictedTanh",
        "dyndet.models.heads.gates.Sigmoid",
        "dyndet.models.heads.gates.Softmax",
        "dyndet.models.heads.none.NoHead",
        "dyndet.models.heads.plain.PlainHead",
        "dyndet.models.heads.separable.SeparableHead",
        "dyndet.models.necks.bifpn.BiFPN",
        "dyndet.models.necks.fpn.FPN",
        "dyndet.models.necks.simple_pyramid.SimplePyramid",
        "dyndet.models.predictors.anchors.AnchorGrid",
        "dyndet.models.predictors.anchors.AnchorGrid.octaves",
        "dyndet.models.predictors.anchors.BoxCoder",
        "dyndet.models.predictors.fcos_assign.CenterSampling",
        "dyndet.models.predictors.atss.ATSS",
        "dyndet.models.predictors.atss_assign.AdaptiveAssigner",
        "dyndet.models.predictors.fcos.FCOS",
        "dyndet.models.predictors.freeanchor.FreeAnchor",
        "dyndet.models.predictors.iou_assign.IoUAssigner",
        "dyndet.models.predictors.normalise.Normaliser",
        "dyndet.models.predictors.postprocess.Postprocess",
        "dyndet.models.predictors.retinanet.RetinaNet",
        "dyndet.models.predictors.yolo_predictor.YoloPredictor",
        "dyndet.models.preprocess.Preprocess",
        "dyndet.models.two_stage.cascade_rcnn.CascadeRCNN",
        "dyndet.models.two_stage.mask.MaskHead",
        "dyndet.models.two_stage.mask.MaskRCNN",
        "dyndet.models.two_stage.roi.BoxHead",
        "dyndet.models.two_stage.roi.FastRCNN",
        "dyndet.models.two_stage.rpn.RPN",
        "dyndet.models.backbones.yolov7.YoloBackbone",
        "dyndet.models.necks.yolov7_pan.YoloNeck",
    }
)
"""Every constructor that a stored configuration may call, by its exact name: none writes a file or calls a name."""

_BACKBONE = "dyndet.models.backbones.timm.TimmBackbone"

UNBUILT = frozenset({"callbacks", "hydra", "logger", "optim", "trainer"})
"""Groups that nothing is ever built of from a file: they may name anything, and no other group may refer to them."""

_KEY = r"\w+(?:\.\w+)*"
_REFERENCE = re.compile(rf"\$\{{(?:({_KEY})|oc\.select:({_KEY})(?:,[\w.+-]+)?|hydra:runtime\.output_dir)\}}", re.ASCII)
_OPENS = re.compile(r"\$(?:\{|\Z)")  # at the end as well: building reads twice what references put together
_KINDS = {"_args_": list, "_convert_": str, "_partial_": bool, "_recursive_": bool}


def check_stored(config: DictConfig, *, source: str | Path) -> None:
    """Checks the configuration of a file before anything of it is resolved or built.

    Args:
        config: as stored, with its references.
        source: the file, for messages.

    Raises:
        UserError: where it names a constructor that is not among `CONSTRUCTORS`, or reads more than its own keys
            (environment variables, say).
    """
    content: Any = OmegaConf.to_container(config, resolve=False)
    if not isinstance(content, dict):
        raise UserError(f"{source} holds no configuration, but a {type(content).__name__}")
    if isinstance(content.get("backbone"), dict):
        content["backbone"].pop("weights", None)  # reading a file has set them to none
    for group, value in content.items():
        for place, found, why in _faults({group: value}, "", built=group not in UNBUILT):
            shown = repr(found) if len(repr(found)) <= 100 else f"{repr(found)[:97]}..."
            where = place if place.isprintable() else repr(place)
            raise UserError(
                f"{source} is not to be trusted blindly: in its configuration {where} is {shown}, {why}. If you trust "
                "where the file comes from, add trust=true (in Python: load_detector(..., trust=True))"
            )


def _faults(node: Any, place: str, *, built: bool) -> Iterator[tuple[str, Any, str]]:
    """Key, value and what is wrong with it."""
    if isinstance(node, dict):
        for key, value in node.items():
            where = f"{place}.{key}" if place else str(key)
            yield from _faults(key, where, built=built)
            if built and key == "_target_" and not (isinstance(value, str) and value in CONSTRUCTORS):
                yield where, value, "which is none of dyndet's parts and could run any code"
            if built and key in _KINDS and not isinstance(value, _KINDS[key]):
                yield where, value, f"which must be a plain {_KINDS[key].__name__}"
            yield from _faults(value, where, built=built)
        if built and node.get("_target_") == _BACKBONE and node.get("weights", "none") != "none":
            yield f"{place}.weights", node["weights"], "which would be fetched: the weights of a file are in it"
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _faults(value, f"{place}[{index}]", built=built)
    elif isinstance(node, str):
        if _OPENS.search(_REFERENCE.sub("{", node)):
            yield place, node, "which reads more than other keys"
        groups = {(match[1] or match[2] or "").split(".")[0] for match in _REFERENCE.finditer(node)}
        if built and groups & UNBUILT:
            yield place, node, "which refers to a group that is never built from a file"
    elif not (node is None or isinstance(node, int | float)):  # bytes become text where text refers to them
        yield place, node, f"which is no plain value, but {type(node).__name__}"
