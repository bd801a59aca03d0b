"""Cross-validation of a COCO-style set: `python scripts/fold_coco.py ROOT OUT [--folds 4] [--seed 1]`.

ROOT holds annotations/train.json, annotations/val.json and images. The training images are dealt out into folds;
OUT/K (K from 1) then looks like ROOT, validates on fold K, and trains on everything else, ROOT's validation images
included. ROOT itself is one more fold: every image is validated once.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the folds; images are linked, not copied."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    splits = []
    for name in ("train", "val"):
        file = options.root / "annotations" / f"{name}.json"
        if not file.is_file():
            parser.error(f"there is no {file}")
        splits.append(json.loads(file.read_text()))
    train, val = splits
    if train["categories"] != val["categories"]:
        parser.error("train.json and val.json must list the same categories in the same order")
    images = train["images"] + val["images"]
    annotations = [{**item, "id": n} for n, item in enumerate(train["annotations"] + val["annotations"], 1)]
    if len({image["id"] for image in images}) < len(images):
        parser.error("train.json and val.json must number their images differently")
    order = sorted(image["id"] for image in train["images"])
    random.Random(options.seed).shuffle(order)
    for fold in range(options.folds):
        held = set(order[fold :: options.folds])
        folder = options.out / str(fold + 1)
        (folder / "annotations").mkdir(parents=True, exist_ok=True)
        for name, wanted in (("train", False), ("val", True)):
            content = {
                **train,
                "images": [image for image in images if (image["id"] in held) == wanted],
                "annotations": [item for item in annotations if (item["image_id"] in held) == wanted],
            }
            (folder / "annotations" / f"{name}.json").write_text(json.dumps(content))
        link = folder / "images"
        if not link.exists():
            link.symlink_to((options.root / "images").resolve())
        print(f"{folder}: validates on {len(held)} images")


if __name__ == "__main__":
    main()
