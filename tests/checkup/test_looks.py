"""Checks of image files: unreadable, empty, repeated and leaked ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from dyndet.checkup.finding import Finding
from dyndet.checkup.looks import BITS_APART, check_pictures, fingerprint, look_at
from dyndet.checkup.split import Split
from dyndet.checkup.surroundings import check_folders, missing_files
from dyndet.data.images import read_header
from dyndet.data.records import FileDataset, Record
from dyndet.structures import Category

SIZE = (48, 64)


def scene(seed: int) -> Image.Image:
    """A picture with structure: a coarse random pattern, enlarged."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((SIZE[1], SIZE[0]), Image.Resampling.BICUBIC)


def split(folder: Path, name: str, pictures: dict[str, Image.Image]) -> Split:
    folder = folder / "images" / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, picture in pictures.items():
        picture.save(folder / file)
    records = [Record.of(folder / file, i, SIZE, [[1, 1, 20, 20]], [0]) for i, file in enumerate(pictures)]
    return Split.of(name, FileDataset(records, [Category(1, "cat")]))


def by_check(findings: list[Finding]) -> dict[tuple[str, str], int]:
    return {(finding.check, finding.severity): finding.count for finding in findings}


def test_different_pictures_are_no_copies(tmp_path: Path) -> None:
    train = split(tmp_path, "train", {f"{i}.png": scene(i) for i in range(30)})
    val = split(tmp_path, "val", {f"{i}.png": scene(100 + i) for i in range(10)})
    looks = look_at([train, val])
    assert len(looks) == 40
    assert check_pictures(looks) == []
    assert len(look_at([train, val], images=4)) == 8


def test_copies_and_near_copies_within_and_across_splits(tmp_path: Path) -> None:
    brighter = ImageEnhance.Brightness(scene(1)).enhance(1.1)
    train = split(tmp_path, "train", {"0.png": scene(0), "1.png": scene(1), "2.png": scene(2), "3.png": scene(0)})
    val = split(tmp_path, "val", {"a.png": scene(2), "b.png": brighter, "c.png": scene(7)})
    findings = check_pictures(look_at([train, val]))
    assert by_check(findings) == {
        ("leaks between splits", "error"): 1,
        ("repeated images", "warning"): 1,
        ("leaks between splits", "warning"): 1,
    }
    near = findings[-1]
    assert "b.png" in near.places[0].where
    assert "1.png" in near.places[0].where


def test_unreadable_and_empty_pictures(tmp_path: Path) -> None:
    pictures = {f"{i}.png": scene(i) for i in range(4)}
    pictures["black.png"] = Image.new("RGB", (SIZE[1], SIZE[0]), (3, 3, 3))
    train = split(tmp_path, "train", pictures)
    torn = tmp_path / "images" / "train" / "2.png"
    torn.write_bytes(torn.read_bytes()[:300])
    findings = check_pictures(look_at([train]))
    assert by_check(findings) == {("unreadable images", "error"): 1, ("images without contrast", "warning"): 1}
    assert "2.png" in findings[0].places[0].where
    assert "black.png" in findings[1].places[0].where


def test_exif_orientations_are_counted_by_how_images_are_read(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    sizes = {"up": (SIZE[1], SIZE[0]), "stored": SIZE, "unsaid": None}  # what labels say (H, W); stored: 48 x 64
    records = []
    for number, (name, size) in enumerate(sizes.items()):
        file = tmp_path / f"{name}.jpg"
        scene(number).save(file, exif=exif)
        records.append(Record.of(file, number, size or read_header(file), [[1, 1, 20, 20]], [0]))
    findings = check_pictures(look_at([Split.of("train", FileDataset(records, [Category(1, "cat")]))]))
    assert {(item.severity, Path(item.places[0].where).stem, "read upright" in item.text) for item in findings} == {
        ("note", "up", True),
        ("warning", "stored", False),
        ("warning", "unsaid", True),
    }
    assert {item.check for item in findings} == {"EXIF orientation"}


@pytest.mark.parametrize("quality", [95, 60])
def test_a_fingerprint_survives_compression_and_size(tmp_path: Path, quality: int) -> None:
    for seed in range(10):
        picture = scene(seed)
        picture.resize((96, 72)).save(tmp_path / "a.jpg", quality=quality)
        with Image.open(tmp_path / "a.jpg") as again:
            assert (fingerprint(picture) ^ fingerprint(again)).bit_count() <= BITS_APART
        assert (fingerprint(picture) ^ fingerprint(scene(seed + 50))).bit_count() > 3 * BITS_APART


def test_files_beside_and_missing(tmp_path: Path) -> None:
    train = split(tmp_path, "train", {"0.png": scene(0), "1.png": scene(1)})
    scene(3).save(tmp_path / "images" / "train" / "extra.png")
    labels = tmp_path / "labels" / "train"
    labels.mkdir(parents=True)
    for name in ("0.txt", "1.txt", "gone.txt", "classes.txt"):
        (labels / name).touch()
    (tmp_path / "images" / "train" / "2.HEIC").touch()
    assert by_check(check_folders([train])) == {
        ("images in no split", "note"): 1,
        ("images that are not read", "warning"): 1,
        ("labels without an image", "warning"): 1,
    }
    assert missing_files([train]) == []
    (tmp_path / "images" / "train" / "1.png").unlink()
    assert by_check(missing_files([train])) == {("missing images", "error"): 1}
    for left in (tmp_path / "images" / "train").iterdir():
        left.unlink()
    (tmp_path / "images" / "train").rmdir()
    assert by_check(check_folders([train])) == {("labels without an image", "warning"): 3}
