"""Files that cannot be used: replaced in training, left out in evaluation, listed once, never without end."""

from __future__ import annotations

import csv
import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from dyndet.data.datamodule import DetectionDataModule
from dyndet.data.drawing import Drawing, file_of
from dyndet.data.quarantine import Fault, Quarantine
from dyndet.data.sampler import KeyedDataset
from dyndet.data.shapes import ShapesDataset
from dyndet.data.truncated import check_complete
from dyndet.data.voc import VocDataset
from dyndet.data.waiting import LEAST, Waiting
from dyndet.data.yolo import YoloDataset
from dyndet.errors import DataError, UserError
from dyndet.structures import Batch, Sample


class Broken(ShapesDataset):
    """Some images cannot be used."""

    def __init__(self, bad: set[int], **arguments: Any) -> None:
        super().__init__(length=8, size=32, **arguments)
        self.bad = bad

    def __getitem__(self, index: int) -> Sample:
        if index in self.bad:
            raise DataError(f"image {index} is broken")
        return super().__getitem__(index)


def data(bad: set[int], **changes: Any) -> DetectionDataModule:
    arguments = {"batch_size": 2, "on_error": "skip"} | changes
    module = DetectionDataModule(train=Broken(bad), val=Broken(bad), **arguments)
    module.setup()
    return module


def ids(loader: Any) -> list[int]:
    return [target.image_id for batch in loader for target in batch.targets]


def test_a_loader_that_refused_frees_its_processes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left to the collector of garbage, for which processes would wait 20 s."""
    monkeypatch.setattr("dyndet.data.workers.cores_here", lambda: 8)
    others = set(active_children())  # of tests before
    gc.disable()
    try:
        loader = data({3}, on_error="raise", num_workers=2).train_dataloader()
        with suppress(DataError):
            ids(loader)
            pytest.fail("no image was refused")
        kept = weakref.ref(loader)
        del loader
        assert kept() is None
        assert set(active_children()) <= others
    finally:
        gc.enable()


def test_training_replaces_and_evaluation_leaves_out(tmp_path: Path) -> None:
    module = data({2, 3})
    module.quarantine.keep(tmp_path)
    seen = ids(module.train_dataloader())
    assert len(seen) == 8 and not {2, 3} & set(seen)
    assert seen == ids(data({2, 3}).train_dataloader())
    assert ids(module.val_dataloader()) == [0, 1, 4, 5, 6, 7]  # images 2 and 3 are a batch
    assert ids(module.val_dataloader()) == [0, 1, 4, 5, 6, 7]
    rows = list(csv.reader((tmp_path / "quarantine.csv").open()))
    assert rows[0] == ["file", "reason"]
    assert sorted(rows[1:]) == [["image 2", "image 2 is broken"], ["image 3", "image 3 is broken"]]
    assert module.quarantine.summary().startswith("data: 2 files left out")


def test_a_replacement_depends_on_the_image_alone() -> None:
    drawing = Drawing(KeyedDataset(Broken({1, 4})), skip=True)
    alone = Drawing(KeyedDataset(Broken({1, 4})), skip=True)
    for index in range(8):
        drawing[0, index]
    for index in (1, 4):
        one, other = drawing[3, index].sample, alone[0, index].sample
        assert one is not None and other is not None and torch.equal(one.image, other.image)


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader"])
def test_nothing_is_left(loader: str) -> None:
    for limit in (3, 100):
        with pytest.raises(DataError, match=r"max_errors|none of the 8 images"):
            ids(getattr(data(set(range(8)), max_errors=limit), loader)())


def test_the_limit_counts_files_not_uses() -> None:
    module = data({2, 3}, max_errors=2)
    for _ in range(3):
        ids(module.train_dataloader())
    with pytest.raises(DataError, match=r"more than data.max_errors=1"):
        ids(data({2, 3}, max_errors=1).train_dataloader())


def test_raising_says_the_way_out() -> None:
    with pytest.raises(DataError, match=r"image 2 is broken; data.on_error=skip"):
        ids(data({2}, on_error="raise").train_dataloader())


@pytest.mark.parametrize("arguments", [{"on_error": "ignore"}, {"max_errors": -1}, {"timeout": 0}])
def test_wrong_keys(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"data.{next(iter(arguments))}="):
        data(set(), **arguments)


def test_single_images_and_samples_follow_the_policy() -> None:
    module = data({0, 4})
    assert len(module.single_images(4)) == 2
    assert len(module.training_samples(8)) == 8
    assert len(module.quarantine.faults) == 2


def test_a_list_goes_on_where_it_ended(tmp_path: Path) -> None:
    for names in (["a"], ["a", "b, with a comma\nand a line"], ["ü"]):
        quarantine = Quarantine("skip")
        quarantine.keep(tmp_path)
        quarantine.add([Fault(name, "broken") for name in names])
    rows = list(csv.reader((tmp_path / "quarantine.csv").open(encoding="utf-8", newline="")))
    assert [row[0] for row in rows] == ["file", "a", "b, with a comma\nand a line", "ü"]


def yolo(folder: Path) -> Callable[..., YoloDataset]:
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    for number, label in enumerate(("0 .5 .5 .5 .5", "0 .5 .5", "0 .5 .5 .5 .5", "0 .5 .5 .5 .5")):
        Image.new("RGB", (30, 20)).save(folder / "images" / f"{number}.png")
        (folder / "labels" / f"{number}.txt").write_text(label)
    (folder / "images" / "2.png").write_bytes(b"")
    (folder / "data.yaml").write_text("train: images\nnames: [a]\n")
    return lambda **options: YoloDataset(folder / "data.yaml", **options)


def test_broken_labels_are_left_out_as_well(tmp_path: Path) -> None:
    read = yolo(tmp_path)
    with pytest.raises(DataError, match=r"2 faults.*data.on_error=skip"):
        read()
    dataset = read(on_error="skip")
    assert [record.path.name for record in dataset.records] == ["0.png", "3.png"]
    assert [Path(fault.file).name for fault in dataset.faults] == ["1.png", "2.png"]
    assert file_of(dataset, 1).endswith("3.png")


def test_broken_xml_is_left_out_of_its_split_alone(tmp_path: Path) -> None:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    for number in range(4):
        Image.new("RGB", (30, 20)).save(tmp_path / "JPEGImages" / f"{number}.jpg")
        text = f"<annotation><object><name>a</name>{box}</object></annotation>" if number % 2 else "<annotation>"
        (tmp_path / "Annotations" / f"{number}.xml").write_text(text)
    (tmp_path / "ImageSets/Main/train.txt").write_text("0\n1\n")
    (tmp_path / "ImageSets/Main/val.txt").write_text("2\n3\n")
    with pytest.raises(DataError, match="2 faults"):
        VocDataset(tmp_path)
    dataset = VocDataset(tmp_path, split="val", on_error="skip")
    assert [record.image_id for record in dataset.records] == [4]
    assert [Path(fault.file).name for fault in dataset.faults] == ["2.xml"]


def test_labels_counted_from_one_are_told_at_once(tmp_path: Path) -> None:
    read = yolo(tmp_path)
    for number in range(4):
        Image.new("RGB", (30, 20)).save(tmp_path / "images" / f"{number}.png")
        (tmp_path / "labels" / f"{number}.txt").write_text(f"{1 + number % 2} .5 .5 .5 .5")
    (tmp_path / "data.yaml").write_text("train: images\nnames: [a, b]\n")
    with pytest.raises(DataError, match=r"look counted from 1.*subtract 1") as caught:
        read()
    assert len(str(caught.value)) < 400


def test_missing_rows() -> None:
    pixels = torch.randint(1, 255, (100, 20, 3), dtype=torch.uint8).numpy()
    check_complete(pixels)
    pixels[90:] = 0
    check_complete(pixels)
    pixels[60:] = 128
    for missing in (pixels, pixels[::-1]):  # from the top, as in BMP
        with pytest.raises(ValueError, match="40 of 100 rows"):
            check_complete(missing)


def test_waiting_is_told_once_and_only_where_it_rules() -> None:
    idle, busy = Waiting(workers=0), Waiting(workers=0)
    told = []
    for step in range(100):
        told.append(idle.waited(10 * step, 10 * step + 9))  # 9 of 10 seconds
        assert not busy.waited(10 * step, 10 * step + 3)
    assert [bool(text) for text in told] == [step == 1 + LEAST // 9 for step in range(100)]
    assert "90% of the time" in next(filter(None, told)) and "data.num_workers" in next(filter(None, told))


class Counter(LightningModule):
    """Counts the images that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[int] = []
        self.validated: list[int] = []
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.trained += [target.image_id for target in batch.targets]
        return self.weight.sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated += [target.image_id for target in batch.targets]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("bad", [{2, 3}, {0, 1}, {6, 7}])
def test_a_trainer_misses_no_batch(bad: set[int]) -> None:
    """Whole batches of a validation are left out, the first and the last of it, too."""
    counter, module = Counter(), data(bad)
    switched_off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    trainer = Trainer(accelerator="cpu", max_epochs=2, num_sanity_val_steps=0, use_distributed_sampler=False,
                      **dict.fromkeys(switched_off, False))  # fmt: skip
    trainer.fit(counter, module)
    assert len(counter.trained) == 16 and not bad & set(counter.trained)
    assert counter.validated == 2 * [index for index in range(8) if index not in bad]
