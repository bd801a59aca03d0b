"""`python -m dyndet.predict ckpt=FILE source=IMAGES [gates=true]`: pictures and a json of what was found."""

from __future__ import annotations

import glob
import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.progress import track

from dyndet.api import detector_from
from dyndet.checkpoint import read_checkpoint
from dyndet.command import run
from dyndet.config import build
from dyndet.data.images import read_image
from dyndet.data.transforms import Compose
from dyndet.errors import UserError
from dyndet.metrics.static import StaticCosts
from dyndet.report.draw import draw_detections
from dyndet.report.gates import preview
from dyndet.structures import Detections, ImageBatch, Sample, Target

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def predict(config: DictConfig) -> Path:
    """Runs a checkpoint over images and returns the folder with the results."""
    saved = read_checkpoint(config.ckpt)
    paths = find_images(config.source)
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    )
    detector = detector_from(saved, impl=config.impl).to(device)
    transform = Compose([build(item) for item in saved.config.data.module.val_transform])
    static = StaticCosts(detector)
    names = [category.name for category in saved.categories]
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for path in track(paths, description="predict"):
        image = read_image(path)
        size = (int(image.shape[1]), int(image.shape[2]))
        none = torch.zeros(0, dtype=torch.int64)
        target = Target(torch.zeros(0, 4), none, none.bool(), original_size=size)
        sample = transform(Sample(image, target), torch.Generator())
        batch = ImageBatch.of([sample.image], detector.preprocess.divisor)
        batch.original_sizes = torch.tensor([size])
        (found,), routing = detector.detect_with_routing(batch)
        macs = float(sum(static(sample.image.shape[-2:], routed=routing is not None).values()))
        if routing is not None:
            macs += float(routing.used()[0] + routing.overhead()[0])
        found = found.to("cpu")
        picture = (
            preview(
                sample.image,
                None,
                found,
                routing,
                names=names,
                strides=detector.strides,
                size=size,
                score_threshold=config.score_threshold,
            )
            if config.gates
            else draw_detections(image, found, names, score_threshold=config.score_threshold)
        )
        picture.save(folder / f"{path.stem}.png")
        results.append({"file": str(path), "size": size, "gmacs": macs / 1e9, "detections": _rows(found, saved)})
    (folder / "detections.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"{len(paths)} images: pictures and detections.json in {folder}")
    return folder


def find_images(source: str) -> list[Path]:
    """The images that a path, a folder or a glob names, sorted.

    Raises:
        UserError: if there are none.
    """
    path = Path(source)
    found = [path] if path.is_file() else list(path.iterdir()) if path.is_dir() else map(Path, glob.glob(source))  # noqa: PTH207 - absolute globs too
    images = sorted(item for item in found if item.suffix.lower() in SUFFIXES)
    if not images:
        raise UserError(f"source={source}: no images there; give an image, a folder of images or a quoted glob")
    return images


def _rows(found: Detections, saved: Any) -> list[dict[str, Any]]:
    return [
        {
            "category_id": saved.categories[label].id,
            "category": saved.categories[label].name,
            "score": score,
            "box_xyxy": box,
        }
        for box, score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    ]


if __name__ == "__main__":
    run(predict, "predict")
