"""Writes docs/model_zoo.md: every experiment with what is published on it, what it costs here, and an estimate of time.

usage: python scripts/model_zoo.py [FILE]    (a minute)

Parameters and multiply-adds are counted on detectors without memory for their weights. Published figures are in
scripts/model_zoo.yaml; experiments that are not there are small ones, or for data of one's own.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig

from dyndet.api import build_detector
from dyndet.cli.compose import compose_experiment
from dyndet.errors import UserError
from dyndet.models.detectors.dynamic import DynamicDetector
from dyndet.ops.flops import MacCounter
from dyndet.structures import Size

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "model_zoo.md"
COCO_TRAIN = 118_287
RATE = 11e12
"""Operations per second that training reaches on one GPU: DynamicDet's authors give 15 minutes for an epoch of
Dy-YOLOv7 on eight RTX 3090, which is 6 x 111 G operations on each of 118,287 images in 2 GPU-hours."""
OTHERS = "Small experiments"
HEADS = {
    False: (
        "experiment", "published as", "AP", "cost", "M", "GMAC here", "M here",
        "GPU-hours, [estimated](#estimated-hours)", "releases that convert",
    ),
    True: ("experiment", "", "GMAC", "M"),
}  # fmt: skip
INTRO = """\
# Model zoo

Every experiment under `conf/experiment`. Published figures are those of the papers and model zoos; **none of the AP on
COCO was measured here**, which needs 8 GPUs. What is counted here are parameters (M, millions) and multiply-adds (GMAC,
10^9; of dynamic detectors all images easy and all hard) at 800 x 1344; at 640 x 640 of YOLO and EfficientDet, at
1280 x 1280 of W6, and of small experiments at their own size. Heads with gates are counted open, dynamic detectors
without the router, which step 2 adds.

```bash
dyndet train +experiment=fcos_d8_dyn data.root=data/coco \\
  trainer.devices=8 data.batch_size=2
```

Releases become checkpoints by `dyndet convert`, see [released weights](recipes.md#released-weights). Depths,
backbones and ablations that are a key away from an experiment are [commands](concepts.md#ablations-and-variants).

This page is written by `python scripts/model_zoo.py`.
"""
HOURS = """\
## Estimated hours

GPU-hours are an estimate, not a measurement: three times the forward pass on all images of the schedule, at 11 TFLOP/s
on each GPU. That is what the 15 minutes come to that the authors of DynamicDet give for an epoch of Dy-YOLOv7 on eight
RTX 3090; other GPUs and precisions differ by factors. Images have the size above; of dynamic detectors step 1 alone.
"""


def experiments() -> list[str]:
    return sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


def published() -> dict[str, dict[str, Any]]:
    """Families, each with a note and its rows by experiment."""
    return yaml.safe_load((ROOT / "scripts" / "model_zoo.yaml").read_text())


def count(name: str) -> tuple[float, list[float], float] | None:
    """Parameters in millions, GMAC (by route) and GMAC of a training step's forward pass; None without data."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            detector = build_detector(name)
    except UserError:  # it waits for data
        return None
    parameters = sum(parameter.numel() for parameter in detector.parameters()) / 1e6
    size, counter = size_of(compose_experiment(name)), MacCounter(detector)
    if not isinstance(detector, DynamicDetector):
        total = counter.count(size)["total"] / 1e9
        return parameters, [total], total
    easy, hard = (counter.count(size, route=route) for route in ("first", "second"))
    both = hard["total"] + sum(value for part, value in easy.items() if part in ("neck", "head", "predictor"))
    return parameters, [easy["total"] / 1e9, hard["total"] / 1e9], both / 1e9


def size_of(config: DictConfig) -> Size:
    """Where an experiment is counted: the size of its images, padded."""
    size = config.data.get("size")
    if size is not None:
        return (size, size) if isinstance(size, int) else (size[0], size[1])
    square = config.data.max_size in (640, 1280)
    return (config.data.max_size, config.data.max_size) if square else (800, 1344)


def hours(name: str, gmacs: float) -> float:
    """Estimated GPU-hours of an experiment's schedule on COCO."""
    config = compose_experiment(name)
    steps = config.trainer.max_steps * config.data.batch_size
    images = steps if steps > 0 else config.trainer.max_epochs * COCO_TRAIN
    return 3 * 2 * gmacs * 1e9 * images / RATE / 3600


def row(name: str) -> str:
    """The line of an experiment."""
    known = {experiment: entry for family in published().values() for experiment, entry in family["rows"].items()}
    counted = count(name)
    parameters = "-" if counted is None else f"{counted[0]:.2f}"
    gmacs = (
        "-" if counted is None else ", ".join(f"{value:.3g}" if value < 1 else f"{value:.1f}" for value in counted[1])
    )
    if name not in known:
        return cells(f"`{name}`", comment(name), gmacs, parameters)
    entry = known[name]
    time = "-" if counted is None else f"{hours(name, counted[2]):.0f}"
    printed = (str(entry.get(key, "-")) for key in ("row", "ap", "cost", "parameters"))
    return cells(f"`{name}`", *printed, gmacs, parameters, time, entry.get("releases", "-"))


def comment(name: str) -> str:
    """What an experiment's file says first."""
    lines = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text().splitlines()
    said = [line.removeprefix("# ") for line in lines if line.startswith("# ") and "@package" not in line]
    return said[0].rstrip(".") if said else ""


def cells(*texts: str) -> str:
    return f"| {' | '.join(texts)} |"


def page(names: Iterable[str]) -> str:
    """The whole page, with the rows of these experiments."""
    names = list(names)
    families = {family: (entry["note"], list(entry["rows"])) for family, entry in published().items()}
    small = [name for name in names if not any(name in rows for _, rows in families.values())]
    families[OTHERS] = ("For CPUs, generated images and data of your own; AP is in [results](results.md).", small)
    parts = [INTRO]
    for family, (note, rows) in families.items():
        head = HEADS[family == OTHERS]
        lines = [cells(*head), cells(*("---" for _ in head)), *(row(name) for name in rows if name in names)]
        parts.append("\n".join([f"## {family}", "", note, "", *lines]))
    parts.append(HOURS)
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    target.write_text(page(experiments()), encoding="utf-8")
    print(f"{len(experiments())} experiments: {target}")


if __name__ == "__main__":
    main()
