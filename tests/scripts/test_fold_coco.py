"""Folds of a COCO-style set."""

from __future__ import annotations

import json
from pathlib import Path

import fold_coco  # type: ignore[import-not-found]
import pytest


def make(root: Path, name: str, ids: range) -> None:
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "images").mkdir(exist_ok=True)
    content = {
        "categories": [{"id": 3, "name": "cell"}],
        "images": [{"id": i, "file_name": f"{i}.png"} for i in ids],
        "annotations": [{"id": 1 + n, "image_id": i, "category_id": 3} for n, i in enumerate([*ids, *ids])],
    }
    (root / "annotations" / f"{name}.json").write_text(json.dumps(content))


def test_every_training_image_is_validated_once(tmp_path: Path) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    make(root, "train", range(10))
    make(root, "val", range(10, 13))
    fold_coco.main([str(root), str(out), "--folds", "3"])
    held = []
    for fold in ("1", "2", "3"):
        train, val = (
            json.loads((out / fold / "annotations" / f"{name}.json").read_text()) for name in ("train", "val")
        )
        seen = [{image["id"] for image in part["images"]} for part in (train, val)]
        assert not seen[0] & seen[1] and seen[0] | seen[1] == set(range(13))
        for part, ids in zip((train, val), seen, strict=True):
            assert sorted(item["image_id"] for item in part["annotations"]) == sorted([*ids, *ids])
            numbers = [item["id"] for item in part["annotations"]]
            assert len(set(numbers)) == len(numbers) and part["categories"] == [{"id": 3, "name": "cell"}]
        assert (out / fold / "images").resolve() == (root / "images").resolve()
        held += seen[1]
    assert sorted(held) == list(range(10))


def test_images_of_one_number_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, "train", range(4))
    make(tmp_path, "val", range(3, 5))
    with pytest.raises(SystemExit):
        fold_coco.main([str(tmp_path), str(tmp_path / "out")])
    assert "differently" in capsys.readouterr().err
