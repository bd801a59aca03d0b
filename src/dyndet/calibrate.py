"""`python -m dyndet.calibrate ckpt=FILE [images=200] [latency_images=16]`: one model, any speed.

Measures what a trained detector costs at its speeds and keeps it in the checkpoint; from then on every command takes
`speed=...`, see `dyndet.speeds.set`. Of a dynamic detector it also prints and draws AP at every
split between its two routes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dyndet.api import detector_from
from dyndet.checkpoints.read import read_checkpoint, write_calibration
from dyndet.cli.command import run
from dyndet.cli.compose import build, fill
from dyndet.cli.configured import count_of
from dyndet.cli.device import device_of
from dyndet.cli.out_of_memory import Work, advice, explained
from dyndet.data.datamodule import DetectionDataModule
from dyndet.errors import UserError
from dyndet.metrics.compute import ComputeMeter
from dyndet.metrics.static import StaticCosts, meter_batch
from dyndet.models.detectors.base import Detector, GatedHead, routed_part
from dyndet.models.detectors.dynamic import DynamicDetector
from dyndet.models.detectors.pyramid import PyramidDetector
from dyndet.speeds.plot import speed_plot
from dyndet.speeds.set import Calibration, Point, difficulty_of, route_settings
from dyndet.speeds.splits import BothWays, Split, go_both_ways
from dyndet.speeds.timing import device_name, time_detections
from dyndet.structures import ImageBatch


def calibrate(config: DictConfig) -> Calibration:
    """Measures, prints, and stores."""
    saved = read_checkpoint(config.ckpt, trust=config.trust)
    device = device_of(config.device)
    if config.data.batch_size is not None:
        saved.config.data.val_batch_size = None  # there is one batch size here
    fill(saved.config.data, config.data, "data")
    if (images := count_of(config, "images")) is not None:
        saved.config.data.max_val = images
    data: DetectionDataModule = build(saved.config.data.module)
    data.quarantine.keep(config.output_dir)
    data.setup("validate")
    detector = detector_from(saved, impl=config.impl, fuse=True).to(device)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    single = data.single_images(config.latency_images)
    work = Work("calibration,")
    with explained(work, lambda: advice(data.val_batch_size, "device=cpu")):
        if isinstance(detector, DynamicDetector):
            calibration = _routes(detector, data, single, folder, work)
        else:
            calibration = _gates(detector, data, single, config.thresholds, work)
    file = write_calibration(config.ckpt, calibration.as_dict(), config.out)
    if text := data.quarantine.summary():
        print(text)
    print(f"calibrated on {calibration.images} images ({calibration.device}): {file}")
    return calibration


def _routes(
    detector: DynamicDetector, data: DetectionDataModule, single: Sequence[ImageBatch], folder: Path, work: Work
) -> Calibration:
    if detector.router is None:
        raise UserError("this dynamic detector has no router yet: train one with +router=exact init=CHECKPOINT")
    static = StaticCosts(detector)
    device = next(detector.parameters()).device
    batches = work.of(track(data.val_dataloader(), description="both routes"))
    ways = BothWays.joined([go_both_ways(detector, static, batch.to(device)) for batch in batches])
    splits = ways.curve(data.categories, [step / 10 for step in range(11)])

    settings = route_settings(detector)
    ends = {name: settings[name] for name in ("easy", "hard")}
    latency = time_detections(detector, single, ends) if single else {}
    points = [
        Point(split.threshold, split.macs, latency.get(name))
        for name, split in (("easy", splits[0]), ("hard", splits[-1]))
    ]
    logits = ways.difficulty.sort().values.tolist()
    calibration = Calibration(points, logits, device_name(detector), len(logits))
    _print_splits(splits, calibration)
    correlation = ways.rank_correlation()
    print(f"difficulty against L1 - L2: Spearman's rank correlation {correlation:.3f}")
    result = {"splits": [asdict(split) for split in splits], "spearman": correlation, **calibration.as_dict()}
    print(f"picture: {speed_plot({'this router': [splits]}, folder / 'curve.png')}")
    (folder / "calibration.json").write_text(json.dumps(_finite(result), indent=1) + "\n")
    return calibration


def _gates(
    detector: Detector,
    data: DetectionDataModule,
    single: Sequence[ImageBatch],
    thresholds: Sequence[float],
    work: Work,
) -> Calibration:
    head = routed_part(detector.head) if isinstance(detector, PyramidDetector) else None
    if not isinstance(head, GatedHead):
        raise UserError("this detector has one speed only, as it has neither a router nor gates: nothing to calibrate")
    static = StaticCosts(detector)
    device = next(detector.parameters()).device
    steps = sorted(set(thresholds), reverse=True)
    macs, images = [], 0
    for threshold in track(steps, description="thresholds"):
        head.close_below(threshold)
        meter = ComputeMeter()
        for batch in work.of(data.val_dataloader()):
            _, routing = detector.detect_with_routing(batch.to(device).images)
            meter_batch(meter, static, routing, batch.images.sizes.tolist())
        report = meter.compute()
        macs.append(report.total.mean)
        images = report.images
    settings = {str(step): (lambda step=step: cast(GatedHead, head).close_below(step)) for step in steps}
    latency = time_detections(detector, single, settings) if single else {}
    points = [Point(step, spent, latency.get(str(step))) for step, spent in zip(steps, macs, strict=True)]
    table = Table("gates close up to", "GMAC", "ms")
    for point in points:
        table.add_row(f"{point.threshold:.3f}", f"{point.macs / 1e9:.3f}", _number(point.latency_ms))
    Console().print(table)
    return Calibration(points, [], device_name(detector), images)


def _print_splits(splits: Sequence[Split], calibration: Calibration) -> None:
    easy, hard = calibration.points
    table = Table("hard", "difficulty above", "GMAC", "ms", "AP", "AP50")
    for split in splits:
        latency = None
        if easy.latency_ms is not None and hard.latency_ms is not None:
            latency = easy.latency_ms + split.fraction * (hard.latency_ms - easy.latency_ms)
        table.add_row(
            f"{split.fraction:.1%}", f"{difficulty_of(split.threshold):.4f}",
            f"{split.macs / 1e9:.3f}", _number(latency), f"{split.ap:.3f}", f"{split.ap50:.3f}",
        )  # fmt: skip
    Console().print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _finite(value: object) -> object:
    """Infinities as words: json has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    run(calibrate, "calibrate")
