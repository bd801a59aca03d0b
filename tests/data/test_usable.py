"""What is refused or warned of before a split is used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dyndet.data.datamodule import DetectionDataModule
from dyndet.data.records import FileDataset, Record, Repairs
from dyndet.errors import DataError, MissingDataError
from dyndet.structures import Category

CATEGORIES = [Category(1, "a")]
GOOD = [3.0, 4, 20, 30]


def split(folder: Path, boxes: list[list[float]], pixels: np.ndarray | None = None) -> FileDataset:
    """An image per box."""
    repairs, records = Repairs(), []
    if pixels is None:
        pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    for number, box in enumerate(boxes):
        Image.fromarray(pixels).save(folder / f"{number}.png")
        record = Record.of(folder / f"{number}.png", number, (40, 60), [box], [0])
        records.append(record.repaired(repairs, lambda index, number=number: f"{number}.txt line {index + 1}"))
    return FileDataset(records, CATEGORIES, repairs=repairs, source="set.json")


def built(train: FileDataset, val: FileDataset) -> DetectionDataModule:
    module = DetectionDataModule(train=train, val=val, batch_size=1, hint="Download it.")
    module.setup()
    return module


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([30.0, 4, 20, 35], r"2 inverted dropped \(0\.txt line 1, 1\.txt line 1\); their ends are exchanged"),
        ([60.0, 4, 80, 35], "2 outside dropped .* may be in pixels where"),
        ([5.0, 4, 5, 35], "2 zero-size dropped"),
        ([5.0, 4, float("nan"), 35], "2 non-finite dropped"),
    ],
)
def test_a_split_without_a_usable_box_is_refused(tmp_path: Path, box: list[float], reason: str) -> None:
    (tmp_path / "good").mkdir()
    good, bad = split(tmp_path / "good", [GOOD]), split(tmp_path, [box, box])
    assert len(bad) == 2  # it can be looked at
    for name, sets in (("train", (bad, good)), ("val", (good, bad))):
        with pytest.raises(DataError, match=rf"^set\.json: no box of the {name} split is usable: {reason}") as caught:
            built(*sets)
        assert "Download" not in str(caught.value) and "\n" not in str(caught.value)
    assert built(split(tmp_path, [box, GOOD]), good).num_classes == 1  # one is left


def test_training_needs_boxes_and_evaluation_does_not(tmp_path: Path) -> None:
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    empty = FileDataset([Record.of(tmp_path / "a.png", 1, (40, 60), [], [])], CATEGORIES, source="set.json")
    (tmp_path / "good").mkdir()
    good = split(tmp_path / "good", [GOOD])
    built(good, empty)
    with pytest.raises(DataError, match="none of the 1 images of the train split has a box to learn from"):
        built(empty, good)


def test_advice_on_missing_files_comes_with_missing_files_alone() -> None:
    def missing() -> FileDataset:
        raise MissingDataError("x.json cannot be read")

    def wrong() -> FileDataset:
        raise DataError("annotation 1 has no segmentation")

    for source, message in (
        (missing, "x.json cannot be read. Download it."),
        (wrong, "annotation 1 has no segmentation"),
    ):
        with pytest.raises(DataError) as caught:
            DetectionDataModule(train=source, val=source, batch_size=1, hint="Download it.").setup()
        assert str(caught.value) == message


@pytest.mark.parametrize(("factor", "warned"), [(1, True), (16, False)], ids=["12 bit", "16 bit"])
def test_images_without_contrast_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, factor: int, warned: bool
) -> None:
    pixels = np.random.default_rng(0).integers(0, 4096, (40, 60)).astype(np.uint16) * factor
    data = split(tmp_path, [GOOD] * 20, pixels)
    built(data, data)
    said = [message for message in caplog.messages if "contrast" in message]
    assert len(said) == warned
    if warned:
        assert "8 of 8 images of the train split" in said[0] and "values 0 to 15 of 0..255" in said[0]
        assert "0.png" in said[0]


def test_a_few_flat_images_are_normal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = split(tmp_path, [GOOD] * 4)
    for number in (0, 3):
        Image.new("RGB", (60, 40)).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").unlink()  # unreadable ones are said when they are read
    built(data, data)
    assert "contrast" in caplog.text  # two of three
    caplog.clear()
    Image.effect_noise((60, 40), 60).convert("RGB").save(tmp_path / "0.png")
    built(data, data)
    assert not caplog.messages
