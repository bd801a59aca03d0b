"""One model, any speed: a wish such as `macs:60e9` becomes a threshold, by what was measured beforehand.

A dynamic detector has two ends, all images easy and all hard, and mixes them. A head with gates closes those that are
open less than a threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from dyndet.errors import UserError
from dyndet.models.detectors.base import Detector, GatedHead, routed_part
from dyndet.models.detectors.dynamic import DynamicDetector
from dyndet.models.detectors.pyramid import PyramidDetector
from dyndet.speeds.splits import quantile

FORMS = "hard_fraction:0.5, macs:60e9, latency_ms:12, threshold:0.43, easy or hard"


@dataclass(frozen=True)
class Point:
    """One measured speed.

    Attributes:
        threshold: of the gates; with a router it is not used.
        macs: mean multiply-adds per image.
        latency_ms: mean per image at batch 1; None where it was not measured.
    """

    threshold: float
    macs: float
    latency_ms: float | None = None


@dataclass(frozen=True)
class Calibration:
    """What `python -m dyndet.calibrate` measured, kept in the checkpoint.

    Attributes:
        points: from the cheapest to the dearest: with a router all easy and all hard, of a head with gates one for
            every threshold that was tried.
        difficulty: with a router, the logits of all images, ascending.
        device: where latency was measured.
        images: on how many images.
    """

    points: list[Point]
    difficulty: list[float] = field(default_factory=list)
    device: str = ""
    images: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain containers, for checkpoints."""
        return asdict(self)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Calibration:
        """From `as_dict`; what was stored as easiness, its negative, is turned round."""
        points = [Point(**point) for point in values["points"]]
        others = {name: value for name, value in values.items() if name not in ("points", "easiness")}
        if values.get("easiness"):
            others["difficulty"] = [-logit for logit in reversed(values["easiness"])]
            points = [replace(point, threshold=-point.threshold) for point in points]
        return cls(points, **others)


def set_speed(detector: Detector, speed: str, calibration: Calibration | None) -> str:
    """Sets a detector's threshold as wished; one line that says what was set.

    Args:
        detector: one with a router, or one whose head has gates.
        speed: see `FORMS`.
        calibration: of this detector; `threshold`, `easy` and `hard` of a dynamic detector go without.

    Raises:
        UserError: if the wish is malformed, out of reach, or not calibrated.
    """
    kind, value = _parsed(speed)
    if isinstance(detector, DynamicDetector):
        if detector.router is None:
            raise UserError(
                f"speed={speed}: this dynamic detector has no router yet; train one with +router=exact init=CHECKPOINT"
            )
        detector.threshold = _route_threshold(kind, value, speed, calibration)
        return f"speed {speed}: hard above a difficulty of {difficulty_of(detector.threshold):.4f}"
    head = routed_part(detector.head) if isinstance(detector, PyramidDetector) else None
    if not isinstance(head, GatedHead):
        raise UserError(f"speed={speed}: this detector has one speed only, as it has neither a router nor gates")
    if kind == "hard_fraction":
        raise UserError(f"speed={speed} is for dynamic detectors; gates take macs, latency_ms, threshold, easy or hard")
    head.close_below(_gate_threshold(kind, value, speed, calibration))
    return f"speed {speed}: gates of at most {head.gate_threshold:.4f} close"


def route_settings(detector: DynamicDetector) -> dict[str, Callable[[], None]]:
    """What to call for all images easy, all hard, and the split that is set now, for `time_detections`."""

    def setting(threshold: float) -> Callable[[], None]:
        return lambda: setattr(detector, "threshold", threshold)

    return {"easy": setting(math.inf), "hard": setting(-math.inf), "now": setting(detector.threshold)}


def _parsed(speed: str) -> tuple[str, float]:
    kind, colon, number = str(speed).partition(":")
    if kind in ("easy", "hard") and not colon:
        return kind, 0.0
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if kind not in ("hard_fraction", "macs", "latency_ms", "threshold") or not math.isfinite(value):
        raise UserError(f"speed={speed} is not understood: write {FORMS}")
    if kind in ("hard_fraction", "threshold") and not 0 <= value <= 1:
        raise UserError(f"speed={speed}: {kind} lies between 0 and 1")
    return kind, value


def _route_threshold(kind: str, value: float, speed: str, calibration: Calibration | None) -> float:
    if kind in ("easy", "hard"):
        return math.inf if kind == "easy" else -math.inf
    if kind == "threshold":
        return -math.inf if value == 0 else math.inf if value == 1 else math.log(value / (1 - value))
    calibration = _required(calibration, speed)
    fraction = value if kind == "hard_fraction" else _between(kind, value, speed, calibration.points)[1]
    return quantile(torch.tensor(calibration.difficulty), fraction)


def _gate_threshold(kind: str, value: float, speed: str, calibration: Calibration | None) -> float:
    if kind == "threshold":
        return value
    if kind == "hard":
        return 0.0
    points = _required(calibration, speed).points
    if kind == "easy":
        return points[0].threshold
    index, share = _between(kind, value, speed, points)
    return points[index].threshold + share * (points[index + 1].threshold - points[index].threshold)


def _required(calibration: Calibration | None, speed: str) -> Calibration:
    if calibration is None:
        raise UserError(
            f"speed={speed} needs a calibration: run python -m dyndet.calibrate ckpt=... on this checkpoint"
        )
    return calibration


def _between(kind: str, value: float, speed: str, points: Sequence[Point]) -> tuple[int, float]:
    """Where a cost lies between two neighbours of the measured points: the index of the cheaper, and how far on."""
    costs = [point.macs if kind == "macs" else point.latency_ms for point in points]
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs):
        raise UserError(f"speed={speed}: latency was not measured; calibrate with latency_images above 0")
    for index in range(len(known) - 1):
        low, high = known[index], known[index + 1]
        if low <= value <= high and high > low:
            return index, (value - low) / (high - low)
    if min(known) <= value <= max(known):
        raise UserError(
            f"speed={speed}: the dearer speeds were not slower when calibrated; measure more latency_images"
        )
    unit = "" if kind == "macs" else " ms"
    raise UserError(
        f"speed={speed} is out of reach: this model goes from {min(known):.7g}{unit} to {max(known):.7g}{unit}"
    )


def difficulty_of(logit: float) -> float:
    """Of a router's logit, infinite ones included."""
    return 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0
