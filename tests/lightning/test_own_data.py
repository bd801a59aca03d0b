"""`data=auto data.root=FOLDER` through the commands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from commands import forked
from dyndet.checkpoints.changes import check_classes
from dyndet.errors import UserError
from dyndet.structures import Category

sys.path.append(str(Path(__file__).parents[1] / "data"))
import layout_cases as cases

TINY = [
    "data.size=64", "data.batch_size=2", "data.num_workers=0", "trainer.max_epochs=1", "trainer.accelerator=cpu",
    "neck.channels=16", "head.norm_groups=4", "head.depth=1", "~callbacks.preview", "~callbacks.density",
    "~callbacks.progress",
]  # fmt: skip


@pytest.mark.slow
def test_a_folder_is_trained_on_with_one_key_and_its_checkpoint_knows_its_classes(tmp_path: Path) -> None:
    cases.yolo_roboflow(tmp_path / "my fruit")
    result = forked(tmp_path, "train", "data=auto", "data.root='my fruit'", *TINY)
    assert result.returncode == 0, result.stderr
    said = result.stdout + result.stderr
    assert said.count("YOLO (data.yaml) in my fruit") == 1 and "classes (2): apple 3, pear 5" in said
    (file,) = tmp_path.glob("outputs/*/*/checkpoints/last.ckpt")
    stored = torch.load(file, weights_only=True)["dyndet"]
    assert stored["config"]["data"]["num_classes"] == 2
    assert [category["name"] for category in stored["categories"]] == ["apple", "pear"]
    again = forked(tmp_path, "evaluate", f"ckpt={file}", "data.val_split=test")
    assert again.returncode == 0 and "2 images" in again.stdout, again.stderr
    cases.yolo_nameless(tmp_path / "other")
    other = forked(tmp_path, "evaluate", f"ckpt={file}", "data.root=other")
    assert other.returncode == 2 and "trained on other categories" in other.stderr
    chosen = forked(tmp_path, "evaluate", f"ckpt={file}", "data=yolo")
    assert (
        chosen.returncode == 2 and "here it comes with the checkpoint, and data.KEY=VALUE changes it" in chosen.stderr
    )


def test_a_detector_is_evaluated_on_classes_of_the_same_names() -> None:
    learned = [Category(1, "cat"), Category(2, "dog")]
    check_classes("a.ckpt", learned, [Category(0, "cat"), Category(7, "dog")])  # ids are those of a file
    for now, words in (
        ([Category(1, "dog"), Category(2, "cat")], r"label 0 was 'cat' \(id 1\) and is 'dog' \(id 1\)"),
        ([Category(0, "cat"), Category(1, "fox")], r"label 1 was 'dog' \(id 2\) and is 'fox' \(id 1\)"),  # not the ids
        ([Category(0, "cat")], r"there were 2 and are 1.*data\.classes=\[cat,dog\]"),
    ):
        with pytest.raises(UserError, match=words):
            check_classes("a.ckpt", learned, now)
