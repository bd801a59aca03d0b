"""`dyndet doctor [+experiment=NAME] data=auto data.root=FOLDER`: what is wrong with a data set.

Takes the same keys as `train`, looks at the data as that would, and changes nothing. Exits with 1 where something is
wrong that makes training fail or its figures lie.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track

from dyndet.checkup.examination import examine, overview
from dyndet.checkup.finding import SEVERITIES, Finding
from dyndet.checkup.sheet import doctor_sheet
from dyndet.checkup.split import read_splits
from dyndet.checkup.surroundings import unreadable_files, unusable
from dyndet.cli.command import run
from dyndet.cli.compose import build
from dyndet.cli.configured import count_of
from dyndet.cli.from_data import follow_data
from dyndet.data.datamodule import DetectionDataModule
from dyndet.data.layouts.describe import describe
from dyndet.errors import DataError
from dyndet.models.detectors.base import Detector

_COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def doctor(config: DictConfig) -> list[Finding]:
    """Prints and writes what is found; raises SystemExit(1) where there is an error among it."""
    console = Console(width=120, soft_wrap=True)
    images = count_of(config, "images")
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    data: DetectionDataModule = build(config.data.module)
    data.quarantine.keep(folder)
    try:
        data.setup("fit")
    except DataError as error:
        findings = [unusable(error)]
        root = config.data.get("root")
        findings += unreadable_files(Path(root)) if root else []
        _write(findings, folder, console)
        raise SystemExit(1) from None
    config.data.num_classes = len(data.categories)
    follow_data(config, data)
    if "weights" in config.backbone:
        config.backbone.weights = "none"  # only what it is is asked for
    detector: Detector = build(config.detector)
    splits = read_splits(data.train, data.val)
    opened = sum(len(split) if images is None else min(images, len(split)) for split in splits)
    if text := describe(data):
        console.print(text, markup=False, highlight=False)
    for line in overview(splits):
        console.print(line, markup=False, highlight=False)
    findings = examine(
        splits,
        detector,
        data.val_transform,
        images=images,
        track=lambda items: track(items, total=opened, description="opening images", transient=True),
    )
    _write(findings, folder, console)
    if config.sheet:
        sheet = doctor_sheet(folder / "doctor.html", splits, findings, data)
        console.print(f"pictures of the worst, and of training batches: {sheet}", markup=False, highlight=False)
    if any(finding.severity == "error" for finding in findings):
        raise SystemExit(1)
    return findings


def _write(findings: list[Finding], folder: Path, console: Console) -> None:
    for finding in findings:
        console.print(f"[{_COLOURS[finding.severity]}]{finding.severity:8s}[/]", end="")
        console.print(finding.text, markup=False, highlight=False)
        for place in finding.places:
            console.print(f"          {place.where}", markup=False, highlight=False, style="dim")
        if finding.advice:
            console.print(f"          -> {finding.advice}", markup=False, highlight=False)
    (folder / "doctor.json").write_text(json.dumps([asdict(finding) for finding in findings], indent=1) + "\n")
    counts = {name: sum(finding.severity == name for finding in findings) for name in SEVERITIES}
    summary = ", ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items())
    console.print(f"{summary}; as json: {folder / 'doctor.json'}", markup=False, highlight=False)


if __name__ == "__main__":
    run(doctor, "doctor")
