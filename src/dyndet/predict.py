"""`python -m dyndet.predict ckpt=FILE source=IMAGES [gates=true]`: pictures and a json of what was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.progress import track

from dyndet.api import detector_from
from dyndet.checkpoints.read import read_checkpoint
from dyndet.cli.command import run
from dyndet.cli.compose import build
from dyndet.cli.device import device_of
from dyndet.data.collate import Collate
from dyndet.data.masks import encode_mask
from dyndet.data.sources import find_images, read_unlabelled
from dyndet.data.transforms import Compose
from dyndet.metrics.compute import ComputeMeter
from dyndet.metrics.static import StaticCosts, meter_batch
from dyndet.report.draw import draw_detections
from dyndet.report.gate_maps import preview
from dyndet.routing import Routes, Routing
from dyndet.structures import Category, Detections


def predict(config: DictConfig) -> Path:
    """Runs a checkpoint over images and returns the folder with the results."""
    saved = read_checkpoint(config.ckpt, trust=config.trust)
    paths = find_images(config.source)
    device = device_of(config.device)
    detector = detector_from(saved, impl=config.impl, speed=config.speed, fuse=config.fuse).to(device)
    transform = Compose([build(item) for item in saved.config.data.module.val_transform])
    collate = Collate(detector.preprocess.pad_multiple)
    static, meter = StaticCosts(detector), ComputeMeter(strides=detector.strides)
    names = [category.name for category in saved.categories]
    folder = Path(config.out)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for number, path in enumerate(track(paths, description="predict")):
        original = read_unlabelled(path)
        sample = transform(original, torch.Generator())
        (found,), routing = detector.detect_with_routing(collate([sample]).images)
        found = found.to("cpu")
        (macs,) = meter_batch(meter, static, routing, [sample.image.shape[-2:]])
        size, threshold = original.target.original_size, config.score_threshold
        if config.gates:
            picture = preview(
                sample.image, None, found, routing, names=names, strides=detector.strides, original_size=size,
                score_threshold=threshold,
            )  # fmt: skip
        else:
            picture = draw_detections(original.image, found, names, score_threshold=threshold)
        drawing = folder / "pictures" / f"{number:04d}_{path.stem}.png"
        picture.save(drawing)
        rows = _rows(found, saved.categories)
        result = {"file": str(path), "picture": str(drawing), "size": size, "gmacs": macs / 1e9, "detections": rows}
        results.append(result | _way(routing))
    (folder / "detections.json").write_text(json.dumps(results, indent=1) + "\n")
    spent = meter.compute().total
    print(f"GMAC per image: mean {spent.mean / 1e9:.3f}, max {spent.max / 1e9:.3f}, min {spent.min / 1e9:.3f}")
    print(f"{len(paths)} images: pictures and detections.json in {folder}")
    return folder


def _way(routing: Routing | Routes | None) -> dict[str, Any]:
    """Through a dynamic detector, of a single image."""
    if not isinstance(routing, Routes):
        return {}
    way = {"route": "hard" if bool(routing.hard[0]) else "easy"}
    return way if routing.difficulty is None else way | {"difficulty": float(routing.difficulty[0].sigmoid())}


def _rows(found: Detections, categories: list[Category]) -> list[dict[str, Any]]:
    """One dict per detection, with the original category id and the mask, if any, as COCO run lengths."""
    rows: list[dict[str, Any]] = [
        {"category_id": categories[label].id, "category": categories[label].name, "score": score, "box_xyxy": box}
        for box, score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    ]
    if found.masks is not None:
        for row, mask in zip(rows, found.masks, strict=True):
            row["segmentation"] = encode_mask(mask)
    return rows


if __name__ == "__main__":
    run(predict, "predict")
