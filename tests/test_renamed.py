"""What was renamed says in one line what to write now."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hydra.core.object_type import ObjectType
from omegaconf import OmegaConf

import dyndet
from dyndet import build_detector
from dyndet.checkpoints.read import read_checkpoint
from dyndet.cli.compose import build, compose_command, compose_experiment
from dyndet.cli.config_source import DyndetConfigSource
from dyndet.cli.renamed import RENAMED, current
from dyndet.errors import UserError

SOURCE = DyndetConfigSource("test", "dyndet://conf")
EXPERIMENTS = """
atss_r101 atss_r101_dyn atss_r50 bccd_atss bccd_atss_dyhead bccd_atss_dyn bccd_coarse bccd_dy_dyhead bccd_dy_dyn
bccd_dy_plain bccd_dyhead bccd_dyhead_dyn bccd_dyn bccd_freeanchor bccd_plain bccd_retinanet bccd_retinanet_dyhead
bccd_retinanet_dyn bccd_softmax bccd_static cascade_rcnn_r50 dy_faster_rcnn_r50 dy_fcos_r50_dyhead dy_mask_rcnn_swint
dy_yolov7 dy_yolov7w6 dy_yolov7x dyhead_atss_r101 dyhead_atss_r50_official dyhead_atss_r50_reproduction
dyhead_atss_r50_simple dyhead_atss_swinl dyhead_atss_swint dyhead_atss_x101 dyhead_atss_x101_dcn dyhead_bifpn_r50
dyhead_faster_rcnn_r50 dyhead_fine_grained_r50 dyhead_retinanet_r50 efficientdet_d1 efficientdet_d1_dyn
faster_rcnn_r101 faster_rcnn_r50 fcos_d4 fcos_d4_dyn fcos_d6 fcos_d6_dyn fcos_d6_dyn_large fcos_d6_dyn_small fcos_d8
fcos_d8_coarse fcos_d8_dyn fcos_d8_dyn_high fcos_d8_dyn_low fcos_d8_gate_depth fcos_d8_gate_none fcos_d8_gate_scale
fcos_d8_retanh fcos_d8_softmax fcos_d8_tau0_5 fcos_d8_tau1_0 fcos_d8_tau2_0 fcos_r101 fcos_r101_d8_dyn fcos_r50
fcos_r50_mmdet fcos_r50_mmdet_plain finetune freeanchor_r50 freeanchor_r50_dyn mask_rcnn_r50 mask_rcnn_swins
mask_rcnn_swint retinanet_r50 retinanet_r50_dyn retinanet_swint_dyn shapes_atss shapes_dy_tiny shapes_dy_yolo
shapes_dyhead shapes_dyhead_dyn shapes_dyn shapes_faster_rcnn shapes_mask_rcnn shapes_retinanet shapes_static yolov7
yolov7w6 yolov7x
"""
"""All that ever had a name."""


def test_every_experiment_exists_or_answers() -> None:
    there = SOURCE.list("experiment", ObjectType.CONFIG)
    assert set(there) <= set(EXPERIMENTS.split()), "add new experiments to the list"
    for name in EXPERIMENTS.split():
        if name in there:
            continue
        now = RENAMED[f"experiment={name}"]
        with pytest.warns(FutureWarning) as caught:
            config = compose_experiment(name)
        now = f"{now} name={name}"  # where its runs are
        assert str(caught[0].message) == f"+experiment={name} is now: {now}"
        assert current([f"+experiment={name}", "seed=1"]) == ([*now.split(), "seed=1"], [str(caught[0].message)])
        assert config.name == name


def test_what_replaces_an_option_composes() -> None:
    for old, new in RENAMED.items():
        group, sign, name = old.partition("=")
        if not sign or group == "experiment":  # a module, a key, or an experiment: see above
            continue
        compose_command("train", new.split())
        assert not SOURCE.is_config(f"{group}/{name}"), f"{old} exists"
        if group == "callbacks":
            with pytest.raises(UserError, match=f"the {group} '{name}' is now: "):
                compose_command("train", [f"{group}=[default,{name}]"])
            continue
        with pytest.warns(FutureWarning, match="is now: "):
            compose_command("train", [f"{group}={name}"])


def test_keys_and_modules_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RENAMED, "head.layers", "head.depth")
    monkeypatch.setitem(RENAMED, "dyndet.models.old_heads", "dyndet.models.heads")
    for old, new in (("head.layers", "head.depth"), ("preprocess.divisor", "preprocess.pad_multiple")):
        with pytest.raises(UserError, match=re.escape(f"the key '{old}' is now '{new}'")):
            compose_command("train", [f"{old}=3"])
    old, new = (f"dyndet.models.{heads}.plain.PlainHead" for heads in ("old_heads", "heads"))
    with pytest.raises(UserError, match=f"{old} is now {new}"):
        build(OmegaConf.create({"part": {"_target_": old}}))


def test_a_file_that_names_old_places_loads(tmp_path: Path) -> None:
    """Every part has lain where the table says; the weights are the same."""
    detector = build_detector("shapes_dy_yolo")
    config = OmegaConf.to_container(compose_experiment("shapes_dy_yolo"))
    back = {new: old for old, new in RENAMED.items() if "=" not in old and old.startswith("dyndet.")}
    text = (
        json.dumps(config)
        .replace('"pad_multiple":', '"divisor":')
        .replace("{preprocess.pad_multiple}", "{preprocess.divisor}")
    )
    for new in sorted(back, key=len, reverse=True):
        text = text.replace(f'"_target_": "{new}', f'"_target_": "{back[new]}')
    assert "dyndet.models.cascade.links" in text and "assemble_cascade" in text
    assert '"divisor": "${preprocess.divisor}"' in text and "pad_multiple" not in text
    weights = {f"detector.{name}": value for name, value in detector.state_dict().items()}
    content = {"state_dict": weights, "dyndet": {"config": json.loads(text), "categories": []}}
    torch.save(content, tmp_path / "old.ckpt")
    loaded = dyndet.load_detector(tmp_path / "old.ckpt")
    assert all(torch.equal(value, weights[f"detector.{name}"]) for name, value in loaded.state_dict().items())
    stored = read_checkpoint(tmp_path / "old.ckpt").config
    assert stored.data.module.pad_multiple == stored.preprocess.pad_multiple == 32
