"""What was called otherwise once, and what to write now."""

from __future__ import annotations

from collections.abc import Sequence

from dyndet.moved import MOVED

_HIGH = "+experiment=fcos_d8_dyn_high"
_R101 = "backbone.name=resnet101.tv_in1k"
_X101 = "backbone.name=resnext101_64x4d.tv_in1k"
_SWIN_S = "backbone.name=swin_small_patch4_window7_224.ms_in1k"

RENAMED: dict[str, str] = {
    # experiments that are another one and a few keys
    "experiment=fcos_d4": "+experiment=fcos_d8 head.depth=4",
    "experiment=fcos_d6": "+experiment=fcos_d8 head.depth=6",
    "experiment=fcos_d4_dyn": "+experiment=fcos_d8_dyn head.depth=4",
    "experiment=fcos_d6_dyn": "+experiment=fcos_d8_dyn head.depth=6",
    "experiment=fcos_d6_dyn_large": "+experiment=fcos_d8_dyn head.depth=6 budget.weight=0.05",
    "experiment=fcos_d6_dyn_small": "+experiment=fcos_d8_dyn head.depth=6 budget.weight=0.2",
    "experiment=fcos_d8_coarse": "+experiment=fcos_d8_dyn head.coarse=true",
    "experiment=fcos_d8_tau0_5": f"{_HIGH} head.activation.tau=0.5",
    "experiment=fcos_d8_tau1_0": f"{_HIGH} head.activation.tau=1.0",
    "experiment=fcos_d8_tau2_0": f"{_HIGH} head.activation.tau=2.0",
    "experiment=fcos_d8_retanh": f"{_HIGH} head.activation.tau=0.0",
    "experiment=fcos_d8_softmax": f"{_HIGH} head/activation=softmax",
    "experiment=fcos_d8_gate_depth": f"{_HIGH} head.gating=depth",
    "experiment=fcos_d8_gate_scale": f"{_HIGH} head.gating=scale",
    "experiment=fcos_d8_gate_none": f"{_HIGH} head.gating=none",
    "experiment=fcos_r101": f"+experiment=fcos_r50 {_R101}",
    "experiment=fcos_r101_d8_dyn": f"+experiment=fcos_d8_dyn {_R101}",
    "experiment=atss_r101": f"+experiment=atss_r50 {_R101}",
    "experiment=dyhead_atss_r101": f"+experiment=dyhead_atss_r50_simple {_R101}",
    "experiment=dyhead_atss_x101": f"+experiment=dyhead_atss_r50_simple {_X101}",
    "experiment=faster_rcnn_r101": f"+experiment=faster_rcnn_r50 {_R101}",
    "experiment=cascade_rcnn_r50": "+experiment=faster_rcnn_r50 predictor=cascade_rcnn",
    "experiment=mask_rcnn_swins": f"+experiment=mask_rcnn_swint {_SWIN_S}",
    "experiment=dyhead_bifpn_r50": ("+experiment=atss_r50 neck=bifpn neck.channels=256 neck.num_layers=3 head=dyhead"),
    "experiment=dyhead_fine_grained_r50": (
        "+experiment=atss_r50 head=dyhead_fine_grained head.towers.depth=4 head.towers.cost_table=published "
        "budget.weight=0.1"
    ),
    "experiment=retinanet_swint_dyn": (
        "+experiment=retinanet_r50_dyn preprocess.pad_multiple=128 backbone=swin_tiny backbone.norm=train "
        "optim=adamw_1x"
    ),
    "experiment=bccd_plain": "+experiment=bccd_static head=plain_small",
    "experiment=bccd_coarse": "+experiment=bccd_dyn head.coarse=true",
    "experiment=bccd_softmax": "+experiment=bccd_dyn head/activation=softmax",
    "experiment=bccd_dyhead": "+experiment=bccd_static head=dyhead_towers_small",
    "experiment=bccd_atss_dyhead": "+experiment=bccd_atss head=dyhead_towers_small",
    "experiment=bccd_dyhead_dyn": "+experiment=bccd_atss_dyn head=dyhead_fine_grained_small",
    "experiment=bccd_freeanchor": "+experiment=bccd_atss predictor=freeanchor_small",
    "experiment=bccd_retinanet_dyhead": "+experiment=bccd_retinanet head=dyhead_towers_small",
    "experiment=bccd_dy_dyhead": "+experiment=bccd_dy_plain head=dyhead_towers_small",
    "experiment=bccd_dy_dyn": "+experiment=bccd_dyn detector=dynamic",
    "experiment=shapes_static": "+experiment=shapes_dyn head=fixed_small",
    "experiment=shapes_dyhead": "+experiment=shapes_dyn head=dyhead_small",
    "experiment=shapes_dyhead_dyn": "+experiment=shapes_dyn head=dyhead_fine_grained_small",
    "experiment=shapes_atss": "+experiment=shapes_dyn head=plain_small predictor=atss_small",
    "experiment=shapes_retinanet": "+experiment=shapes_dyn head=plain_small predictor=retinanet_small",
    # options that are another one and a key
    "head=coarse": "head=fine_grained head.coarse=true head.cost_table=published",
    "head=coarse_small": "head=fine_grained_small head.coarse=true",
    "predictor=yolo_small": "predictor=yolo_p5_small",
    "preprocess=imagenet_128": "preprocess=imagenet preprocess.pad_multiple=128",
    "preprocess=caffe_128": "preprocess=caffe preprocess.pad_multiple=128",
    "backbone=resnet101": f"backbone=resnet50 {_R101}",
    "backbone=resnet101_caffe": "backbone=resnet50_caffe backbone.name=resnet101",
    "backbone=resnext101_64x4d": f"backbone=resnet50 {_X101} backbone.norm=eval",
    "backbone=resnext101_64x4d_dcn": (
        f"backbone=resnet50 {_X101} backbone.norm=eval backbone.deformable_stages=[3,4,5]"
    ),
    "backbone=swin_small": f"backbone=swin_tiny {_SWIN_S}",
    "backbone=swin_large": "backbone=swin_tiny backbone.name=swin_large_patch4_window12_384.ms_in22k",
    "backbone=convnext_tiny": "backbone=swin_tiny backbone.name=convnext_tiny.fb_in1k",
    "backbone=efficientnet_b1": (
        "backbone=resnet50 backbone.name=tf_efficientnet_b1.aa_in1k backbone.frozen_stages=-1 backbone.norm=train"
    ),
    "budget=default": "budget._target_=dyndet.models.budget.Budget",  # no group any more: there was one option
    "detector=cascade": "detector=dynamic",
    "detector=cascade_two_stage": "detector=dynamic_two_stage",
    "callbacks=ema_yolo": "callbacks=[default,ema] callbacks.ema.decay=0.9999 callbacks.ema.ramp=2000",
    # keys, and what they set in stored configurations
    "preprocess.divisor": "preprocess.pad_multiple",
    "data.module.divisor": "data.module.pad_multiple",
    "dyndet.models.preprocess.Preprocess.divisor": "dyndet.models.preprocess.Preprocess.pad_multiple",
    "dyndet.data.datamodule.DetectionDataModule.divisor": "dyndet.data.datamodule.DetectionDataModule.pad_multiple",
    # where parts lay, and functions that were called otherwise there
    **MOVED,
    "dyndet.models.detectors.cascade.assemble_cascade": "dyndet.models.detectors.dynamic.assemble_dynamic",
    "dyndet.models.detectors.dynamic.assemble_cascade": "dyndet.models.detectors.dynamic.assemble_dynamic",
}
"""From `GROUP=NAME`, a key (`head.old_name`), the module path of a `_target_` or an argument of one to what replaces
it."""


def current(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Command-line arguments with experiments and options by their names of today, and a line on each that was not.

    Args:
        arguments: for instance ["+experiment=fcos_d4", "head=coarse"]; keys and lists of options stay as they are.
    """
    now, notes = [], []
    for argument in arguments:
        old = argument.lstrip("+")
        new = RENAMED.get(old)
        if new is not None and old.startswith("experiment="):  # runs stay in the folder of that name
            new = f"{new} name={old.removeprefix('experiment=')}"
        now += [argument] if new is None else new.split()
        notes += [] if new is None else [f"{argument} is now: {new}"]
    return now, notes


def replacement(old: str) -> str | None:
    """What to write for a name: itself or, for a `_target_`, the module it lies in was renamed.

    Args:
        old: as the keys of `RENAMED`.
    """
    parts = old.split(".")
    for end in range(len(parts), 0, -1):
        new = RENAMED.get(".".join(parts[:end]))
        if new is not None:
            return ".".join([new, *parts[end:]])
    return None
