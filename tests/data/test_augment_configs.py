"""The presets of training augmentation compose with every data configuration and build."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from dyndet.cli.compose import build, compose_experiment
from dyndet.data.datamodule import DetectionDataModule
from dyndet.errors import UserError

PRESETS = ["yolo", "yolo_masks", "yolo_light", "letterbox"]


def module_of(*overrides: str) -> DetectionDataModule:
    module = build(compose_experiment(None, list(overrides)).data.module)
    module.setup("fit")
    return module


@pytest.mark.parametrize("preset", PRESETS)
def test_generated_images_become_squares(preset: str) -> None:
    few = ("data.train_images=8", "data.val_images=4", "data.batch_size=4")
    module = module_of(f"+data/augment={preset}", "data.augment.size=96", *few)
    batch = next(iter(module.train_dataloader()))
    assert batch.images.pixels.shape == (4, 3, 96, 96)
    assert all(target.masks is None for target in batch.targets)
    assert sum(len(target.boxes) for target in batch.targets)
    assert next(iter(module.val_dataloader())).images.pixels.shape[2:] == (128, 128)  # evaluation is left alone


def test_masks_reach_a_detector_that_learns_them() -> None:
    few = ["data.train_images=4", "data.val_images=2", "data.batch_size=2", "data.augment.size=96"]
    config = compose_experiment("shapes_mask_rcnn", ["+data/augment=yolo_masks", *few])
    module = build(config.data.module)
    module.setup("fit")
    for target in next(iter(module.train_dataloader())).targets:
        assert target.masks is not None and target.masks.shape == (len(target.boxes), 96, 96)


def test_data_without_masks_is_named() -> None:
    with pytest.raises(UserError, match=r"data\.masks, which this data does not have"):
        build(compose_experiment("yolov7", ["data=voc", "data/augment=yolo_masks"]).data.module)


@pytest.mark.parametrize("data", ["coco", "voc", "yolo", "bccd", "shapes"])
@pytest.mark.parametrize("preset", ["yolo", "letterbox"])
def test_any_data_takes_them(data: str, preset: str) -> None:
    plain = compose_experiment(None, [f"data={data}"]).data.module
    module = compose_experiment(None, [f"data={data}", f"+data/augment={preset}"]).data.module
    names = [item["_target_"].rsplit(".", 1)[1] for item in module.train_transform]
    assert names[-2:] == ["Hsv", "RandomHorizontalFlip"]
    assert (module.train_mix is None) == (preset == "letterbox")
    assert module.val_transform == plain.val_transform and module.train == plain.train
    assert module.group_by_aspect is False


def test_published_amounts() -> None:
    config = compose_experiment(None, ["data=coco", "+data/augment=yolo_masks"]).data
    published = {
        "size": 640, "mosaic": 1.0, "nine": 0.2, "mixup": 0.15, "paste": 0.15, "degrees": 0.0, "translate": 0.2,
        "scale": 0.9, "shear": 0.0, "hue": 0.015, "saturation": 0.7, "value": 0.4, "flip": 0.5,
    }  # fmt: skip
    assert OmegaConf.to_container(config.augment) == published
    assert config.module.train.load_masks is True
    mix = build(config.module.train_mix)
    assert (mix.p, mix.base.p, mix.base.base.p, mix.base.base.nine) == (0.15, 0.15, 1.0, 0.2)
    affine = mix.base.base.affine
    assert (mix.base.base.size, affine.translate, affine.scale) == (640, 0.2, pytest.approx((0.1, 2.0)))
    assert (affine.degrees, affine.shear) == (0, 0)
    hsv, flip = (build(item) for item in config.module.train_transform[:2])
    assert hsv.amounts == (0.015, 0.7, 0.4) and flip.p == 0.5


def test_amounts_are_plain_overrides() -> None:
    lighter = ["+data/augment=yolo_light", "data.augment.size=64", "data.augment.scale=0.2", "data.augment.mosaic=0.25"]
    mix = build(compose_experiment(None, lighter).data.module.train_mix)
    assert (mix.p, mix.base.p, mix.base.base.p, mix.base.base.size) == (0, 0, 0.25, 64)
    assert mix.base.base.affine.scale == pytest.approx((0.8, 1.3))
    light = build(compose_experiment(None, ["+data/augment=yolo_light"]).data.module.train_mix)
    assert light.base.base.affine.scale == (0.5, 1.5)


@pytest.mark.data
def test_real_images(shared_data) -> None:
    root = shared_data / "coco_mini"
    module = module_of(
        "data=coco", "+data/augment=yolo_masks", f"data.root={root}", "data.augment.size=320",
        "data.train_annotations=${data.root}/annotations/train.json", "data.train_images=${data.root}/images",
        "data.val_annotations=${data.root}/annotations/val.json", "data.val_images=${data.root}/images",
        "data.num_workers=0", "data.batch_size=2", "data.augment.paste=1.0",
    )  # fmt: skip
    batch = next(iter(module.train_dataloader()))
    assert batch.images.pixels.shape == (2, 3, 320, 320) and batch.images.pixels.dtype == torch.uint8
    for target in batch.targets:
        assert (target.boxes >= 0).all() and (target.boxes <= 320).all()
        assert ((target.boxes[:, 2:] - target.boxes[:, :2]) > 2).all()
        assert target.labels.max() < 80
