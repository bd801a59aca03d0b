"""What a configuration leaves to the training set."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf, open_dict

from dyndet.cli.compose import build, compose_experiment
from dyndet.cli.from_data import follow_data
from dyndet.data.box_sizes import anchor_scale, base_range, box_shapes, reaches

SMALL = ["predictor=fcos_short", "data.train_images=40", "data.val_images=4", "data.batch_size=4"]


def followed(epochs: int, steps: list[int], *overrides: str) -> tuple[dict[str, float], str]:
    """The derived numbers and the line on them."""
    config = compose_experiment("shapes_dyn", [*SMALL, "trainer.max_epochs=null", *overrides])
    with open_dict(config):
        config.follow = {"epochs": epochs, "steps": steps, "validations": 3}
    data = build(config.data.module)
    data.setup("fit")
    line = follow_data(config, data)
    numbers = {"base": config.predictor.assigner.base_range, "epochs": config.trainer.max_epochs}
    return numbers | {"every": config.trainer.check_val_every_n_epoch}, line


@pytest.mark.parametrize(("epochs", "steps", "expected"), [
    (7, [10, 1000], 7),  # 10 batches an epoch
    (7, [95, 1000], 10),  # at least 95 steps
    (7, [10, 31], 4),  # at most 31, in whole epochs
])  # fmt: skip
def test_length_follows_the_number_of_images(epochs: int, steps: list[int], expected: int) -> None:
    numbers, line = followed(epochs, steps, "trainer.check_val_every_n_epoch=null")
    assert numbers["epochs"] == expected
    assert numbers["every"] == max(1, expected // 3)
    assert f"trainer.max_epochs={expected} of 10 steps" in line
    assert f"predictor.assigner.base_range={numbers['base']:g}" in line


@pytest.mark.parametrize(("keys", "steps"), [
    (["trainer.devices=2"], 5), (["trainer.devices=[0,1]", "trainer.num_nodes=2"], 2),
    (["trainer.devices='0,1'", "trainer.accumulate_grad_batches=2"], 3), (["trainer.devices='1'"], 10),
])  # fmt: skip
def test_length_counts_images_of_all_processes(keys: list[str], steps: int) -> None:
    numbers, line = followed(1, [30, 1000], "trainer.accelerator=cpu", *keys)
    assert numbers["epochs"] == 30 // steps and f"of {steps} steps" in line


def test_ranges_are_those_of_the_training_boxes() -> None:
    numbers, _ = followed(1, [1, 9])
    config = compose_experiment("shapes_dyn", SMALL)
    data = build(config.data.module)
    data.setup("fit")
    assert numbers["base"] == base_range(reaches(box_shapes(data.train, None)), (8, 16, 32))


def test_numbers_that_are_given_stay() -> None:
    numbers, line = followed(5, [1, 9], "predictor.assigner.base_range=17", "trainer.max_epochs=2")
    assert (numbers["base"], numbers["epochs"], line) == (17, 2, "")


@pytest.mark.parametrize(("overrides", "key"), [
    (["predictor=atss_short"], "scale"),
    (["predictor=retinanet_short"], "anchors.base"),
    (["predictor=freeanchor", "predictor.anchors.base=null"], "anchors.base"),
    (["predictor=faster_rcnn_small", "predictor.rpn.anchors.scales=null"], "rpn.anchors.scales"),
    (["predictor=yolo_p5", "predictor.anchors=null"], "anchors"),
])  # fmt: skip
def test_anchors_are_those_of_the_training_boxes(overrides: list[str], key: str) -> None:
    config = compose_experiment("shapes_dyn", [*SMALL[1:], *overrides])
    data = build(config.data.module)
    data.setup("fit")
    line = follow_data(config, data)
    found = OmegaConf.select(config.predictor, key)
    if key == "anchors":
        assert (len(found), len(found[0])) == (3, 3)
    else:
        per_octave, ratios = (3, [0.5, 1, 2]) if key == "anchors.base" else (1, [1] if key == "scale" else [0.5, 1, 2])
        shapes = box_shapes(data.train, None)
        expected = anchor_scale(shapes, (8, 16, 32), per_octave=per_octave, ratios=ratios)
        assert found == (expected if key != "rpn.anchors.scales" else [expected])
    assert f"predictor.{key}=" in line and "objects of" in line
    if "rcnn" not in overrides[0]:  # which needs another detector
        assert build(config.predictor, channels=64, strides=(8, 16, 32)) is not None
