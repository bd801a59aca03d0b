"""Experiments compose and build; mistakes are answered in one line."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from torch import nn

from dyndet import build_detector
from dyndet.checkpoints.trusted import check_stored
from dyndet.cli.arguments import check_arguments
from dyndet.cli.compose import build, compose_experiment
from dyndet.cli.device import device_of
from dyndet.errors import UserError
from dyndet.models.detectors.dynamic import DynamicDetector

CONF = Path(__file__).parents[1] / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@cache
def composed(experiment: str) -> DictConfig:
    given = ["data.root=x", "data.num_classes=3"] if experiment == "finetune" else []  # which only the user knows
    return compose_experiment(experiment, ["output_dir=x", *given])


def test_experiments_build() -> None:
    for experiment in EXPERIMENTS:
        config = composed(experiment)
        assert config.name == experiment, f"conf/experiment/{experiment}.yaml: name is {config.name}"
        check_stored(config, source="its checkpoint")  # which needs no trust
        config = config.copy()
        if config.backbone.get("weights") == "timm":
            config.backbone.weights = "none"
        with torch.device("meta"):
            detector = build(config.detector)
        parts = [detector.first, detector.second] if isinstance(detector, DynamicDetector) else [detector]
        for part in parts:
            assert part.predictor.num_classes == config.data.num_classes, f"conf/experiment/{experiment}.yaml"


def test_no_experiment_is_mistaken_for_a_mistake() -> None:
    for experiment in EXPERIMENTS:
        config = composed(experiment)
        for part in ("data", "detector", "optim", "trainer", "callbacks", "logger"):
            check_arguments(config[part])


YOLO = ["yolov7", "yolov7x", "yolov7w6", "dy_yolov7", "dy_yolov7x", "dy_yolov7w6"]


def test_what_runs_on_coco_shares() -> None:
    for experiment in EXPERIMENTS:
        config = composed(experiment)
        if config.data.get("root") != "data/coco" or experiment == "finetune":
            assert experiment.startswith(("bccd", "finetune", "shapes")), experiment
            continue
        assert config.callbacks.last.every_n_train_steps == 1000, experiment
        assert config.data.module.train.skip_empty == (experiment not in YOLO), experiment
        assert not config.data.module.val.get("skip_empty", False), experiment


def test_experiments_optimise() -> None:
    """Groups merge: keys of one optimizer must not reach another. Schedules fit into their runs."""
    for experiment in EXPERIMENTS:
        optim, steps = composed(experiment).optim, composed(experiment).trainer.max_steps
        part = nn.ModuleDict({"backbone": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
        optimizer = build(optim.optimizer)(part)
        adaptive = isinstance(optimizer, torch.optim.AdamW)
        rate = optimizer.param_groups[0]["lr"]
        assert 1e-5 <= rate <= (3e-3 if adaptive else 0.02), f"conf/experiment/{experiment}.yaml: lr is {rate}"
        schedule = build(optim.schedule)(optimizer, total_steps=max(steps, 1000))
        optimizer.step()
        schedule.step()


CASCADES = [name for name in EXPERIMENTS if "dy_" in name]


@pytest.mark.parametrize(
    ("experiment", "router"),
    [(name, router) for name in CASCADES for router in ("exact", "online")]
    + [(name, "yolo") for name in CASCADES if name.startswith("dy_yolo")],
)
def test_step_2_optimises(experiment: str, router: str) -> None:
    config = compose_experiment(experiment, [f"+router={router}", "init=x"])
    part = nn.Linear(2, 2)
    optimizer = build(config.optim.optimizer)(part)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["lr"] == (1e-5 if router == "online" else 1e-4)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.005, 0.0]
    assert (config.optim.schedule is None) == (router != "online")


def test_a_mistake_within_a_file_is_explained() -> None:
    with pytest.raises(UserError, match="data/augment"):
        compose_experiment("shapes_dy_yolo", ["+router=yolo", "init=x"])


def test_every_target_exists() -> None:
    def walk(node: object, path: Path) -> None:
        if isinstance(node, dict):
            if "_target_" in node:
                assert callable(get_object(node["_target_"])), f"{path}: {node['_target_']}"
            for value in node.values():
                walk(value, path)
        elif isinstance(node, list):
            for value in node:
                walk(value, path)

    for path in sorted(CONF.rglob("*.yaml")):
        config = OmegaConf.load(path)
        assert isinstance(config, DictConfig), path
        walk(OmegaConf.to_container(config, resolve=False), path)


def test_an_experiment_is_a_short_diff() -> None:
    for path in (CONF / "experiment").glob("*.yaml"):
        assert len(path.read_text().splitlines()) <= 16 or path.stem.endswith("r50"), path


def test_lambda_is_the_published_one() -> None:
    published = {"fcos_d8_dyn": 0.1, "fcos_d8_dyn_low": 0.8, "fcos_d8_dyn_high": 0.0, "fcos_d8_dyn head.depth=4": 0.1}
    for line, weight in published.items():
        experiment, *overrides = line.split()
        config = compose_experiment(experiment, overrides)
        assert config.budget.weight == weight
        assert config.budget.scale_gradient == "published"
        assert config.head.activation.tau == 1.5 and config.head.openness == 0.99
        assert config.head.cost_table == "published"


@pytest.mark.parametrize(("experiment", "images"), [("yolov7", 16), ("dy_yolov7x", 16), ("dy_yolov7w6", 4)])
def test_yolo_is_evaluated_in_smaller_batches(experiment: str, images: int) -> None:
    module = build(composed(experiment).data.module)
    assert (module.batch_size, module.val_batch_size) == (128, images)


@pytest.mark.parametrize("data", ["coco", "voc", "yolo", "shapes", "bccd"])
def test_evaluation_has_a_batch_size_of_its_own(data: str) -> None:
    for change, images in (([], 6), (["data.val_batch_size=2"], 2)):
        module = build(compose_experiment(None, [f"data={data}", "data.batch_size=6", *change]).data.module)
        assert (module.batch_size, module.val_batch_size) == (6, images)


def test_any_data_may_leave_out_images_without_objects() -> None:
    for data in ("voc", "yolo"):
        for skip in (False, True):
            config = compose_experiment("yolov7", [f"data={data}", f"data.skip_empty={skip}"])
            assert config.data.module.train.skip_empty is skip
    assert "skip_empty" not in compose_experiment("yolov7", ["data=shapes"]).data.module.train


@pytest.mark.parametrize(
    ("experiment", "overrides", "words"),
    [
        ("fcos_d8_dny", [], ["no experiment 'fcos_d8_dny'", "Did you mean 'fcos_d8_dyn'"]),
        (None, ["head.dpeth=3"], ["no key 'head.dpeth'", "Did you mean 'head.depth'"]),
        (None, ["head=no_head"], ["no head 'no_head'", "fine_grained"]),
        (None, ["head.norm_stats=foo"], ["norm_stats must be one of active, position, dense, published"]),
        (None, ["backbone.name=resnet51"], ["timm has no model 'resnet51'", "backbone.name"]),
        (None, ["backbone.weights=/no/such/file.pth"], ["no weight file at /no/such/file.pth", "backbone.weights"]),
        (None, ["backbone.strides=[3]"], ["has strides", "backbone.strides"]),
        (None, ["precision.head=bf16"], ["precision head=bf16", "bfloat16"]),
        (None, ["precision.tail=bfloat16"], ["no key 'precision.tail'"]),
        (None, ["head=dyhead_small", "head.spatial=maybe"], ["head.spatial must be true or false, got 'maybe'"]),
        (None, ["head=dyhead_small", "head.num_blocks=two"], ["head.num_blocks must be a whole number, got 'two'"]),
        (None, ["head=dyhead_fine_grained_small", "head.attention.num_blocks=2.5"], ["head.attention.num_blocks must"]),
        (
            None,
            ["head=dyhead_small", "head.high_offset=x"],
            ["head.high_offset must be one of prefix, resize, upsample"],
        ),
        (None, ["head=dyhead_small", "head.gn_groups=0"], ["gn_groups=0", "neck.channels"]),
        (
            None,
            ["neck=bifpn", "head=dyhead"],
            ["gn_groups=16 must divide the channels of the neck, 88", "neck.channels"],
        ),
        (None, ["head=plain_small", "head.norm_groups=7"], ["norm_groups=7", "32", "neck.channels"]),
        (None, ["head=fixed_small", "head.norm_groups=7"], ["norm_groups=7", "32", "neck.channels"]),
        (None, ["head.norm_groups=null"], ["head.norm_groups must be a whole number, got null"]),
        (None, ["predictor.kernel=2"], ["kernel must be odd, got 2"]),
        (None, ["predictor.postprocess.topk=0"], ["topk must be at least 1, got 0"]),
        (None, ["predictor=atss_small", "predictor.assigner.topk=0"], ["topk must be at least 1, got 0"]),
        (None, ["predictor=freeanchor", "predictor.bag_size=0"], ["bag_size must be at least 1, got 0"]),
    ],
)
def test_mistakes_are_answered_in_one_line(experiment: str | None, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        build_detector(experiment, overrides)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("part", "override", "words"),
    [
        ("data.module", "data.batch_size=0", "data.batch_size must be at least 1, got 0"),
        ("optim.optimizer", "optim.optimizer.lr=fast", "optim.optimizer.lr must be a number, got 'fast'"),
        ("trainer", "trainer.max_epochs=many", "trainer.max_epochs must be a whole number or null, got 'many'"),
        ("trainer", "trainer.max_steps=true", "trainer.max_steps must be a whole number, got True"),
        ("callbacks", "callbacks.last.save_on_exception=1", "last.save_on_exception must be true or false, got 1"),
    ],
)
def test_other_parts_name_the_key_too(part: str, override: str, words: str) -> None:
    config = compose_experiment(None, [override, "output_dir=x"])
    with pytest.raises(UserError, match=words):
        built = build(OmegaConf.select(config, part))
        if part == "data.module":
            built.setup("fit")


def test_images_in_place_of_a_folder() -> None:
    config = compose_experiment("bccd_static", ["data.train_images=8"])
    with pytest.raises(UserError, match=r"data\.train_images must be a word or a path"):
        build(config.data.module).setup("fit")


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(UserError, match="device=abacus is not available"):
        device_of("abacus")
    assert device_of("cpu").type == "cpu"


def test_building_a_detector_never_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    seen = []
    original = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **kw: seen.append(kw) or original(name, **kw))
    with torch.device("meta"):
        build_detector("fcos_r50")
    assert seen
    assert not any(kw.get("pretrained") for kw in seen)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["detector=two_stage"], ["predictor.rpn", "choose one that fits"]),
        (["predictor=faster_rcnn"], ["two stages", "detector=two_stage"]),
        (["neck=bifpn_small", "backbone.strides=[8,32]"], ["neck.num_levels", "backbone.strides"]),
        (["neck=yolov7"], ["256, 512, 1024 channels", "this head", "neck=fpn"]),
        (["neck=yolov7", "head=dyhead"], ["256, 512, 1024 channels", "this head"]),
        (["neck=yolov7", "head=none"], ["256, 512, 1024 channels", "this predictor", "YOLO's predictors"]),
        (
            ["neck=yolov7", "head=none", "predictor=faster_rcnn_small", "detector=two_stage"],
            ["256, 512, 1024 channels", "this predictor"],
        ),
        (["neck=yolov7", "head=none", "predictor=yolo_p5_small", "+predictor.colour=1"], ["argument 'colour'"]),
    ],
)
def test_parts_that_do_not_fit_are_named(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        build_detector(None, overrides)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words)


def test_an_experiments_keys_do_not_turn_a_part_into_another() -> None:
    """Those of the experiment lie on top of what is chosen on the command line."""
    swin = "swin_tiny_patch4_window7_224.ms_in1k"
    with pytest.raises(UserError, match=r"backbone=swin_tiny: .*name=resnet101.* add backbone\.name=swin"):
        compose_experiment("atss_r101_dyn", ["backbone=swin_tiny"])
    assert compose_experiment("atss_r101_dyn", ["backbone=swin_tiny", f"backbone.name={swin}"]).backbone.name == swin
    assert compose_experiment("bccd_dyn", ["backbone=swin_tiny"]).backbone.name == swin


def test_a_key_for_another_part_says_how_to_drop_it() -> None:
    config = compose_experiment("fcos_d8_dyn", ["head=fixed"])
    with pytest.raises(
        UserError, match=r"head\.cost_table: FixedHead has no argument 'cost_table'; ~head\.cost_table "
    ):
        build(config.detector)
    assert "cost_table" not in compose_experiment("fcos_d8_dyn", ["head=fixed", "~head.cost_table"]).head
