"""The data configurations build what they name, on real data where it is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from dyndet.cli.compose import build, compose_experiment
from dyndet.data.datamodule import DetectionDataModule


def module_of(*overrides: str) -> DetectionDataModule:
    module = build(compose_experiment(None, list(overrides)).data.module)
    module.setup("fit")
    return module


def test_shapes() -> None:
    module = module_of("data.train_images=8", "data.val_images=4", "data.batch_size=2")
    batch = next(iter(module.train_dataloader()))
    assert batch.images.pixels.shape == (2, 3, 128, 128)


@pytest.mark.data
def test_bccd(shared_data: Path) -> None:
    module = module_of("data=bccd", f"data.root={shared_data}/bccd", "data.num_workers=0")
    assert (len(module.train), len(module.val)) == (292, 72)
    assert sum(len(module.train[i].target.labels) for i in range(292)) == 3941
    assert [(c.id, c.name) for c in module.categories] == [(1, "RBC"), (2, "WBC"), (3, "Platelets")]
    assert next(iter(module.val_dataloader())).images.sizes.tolist() == [[240, 320]] * 8


@pytest.mark.data
def test_coco_layout_keys(shared_data: Path) -> None:
    root = shared_data / "coco_mini"
    module = module_of(
        "data=coco", f"data.root={root}", "data.train_annotations=${data.root}/annotations/train.json",
        "data.val_annotations=${data.root}/annotations/val.json", "data.train_images=${data.root}/images",
        "data.val_images=${data.root}/images", "data.num_workers=0", "data.batch_size=2",
    )  # fmt: skip
    assert len(module.val) == 33 and len(module.train) == 43  # the image without annotation does not train
    batch = next(iter(module.train_dataloader()))
    assert batch.images.pixels.shape[2] % 32 == 0 and batch.images.sizes.max() <= 1333


@pytest.mark.data
def test_voc(shared_data: Path) -> None:
    module = module_of("data=voc", f"data.root={shared_data}/bccd_voc", "data.num_classes=3", "data.num_workers=0")
    assert len(module.val) == 6
    assert [c.name for c in module.categories] == ["Platelets", "RBC", "WBC"]


@pytest.mark.data
def test_yolo(shared_data: Path) -> None:
    config = f"data.config={shared_data}/coco_yolo/config.yaml"
    module = module_of("data=yolo", config, "data.val_split=train", "data.num_workers=0", "data.batch_size=4")
    assert len(module.train) == 15
    assert sum(len(module.train[i].target.labels) for i in range(15)) == 133
