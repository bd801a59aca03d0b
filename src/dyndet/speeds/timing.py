"""What closed gates buy on real images: the head's time against that of a fixed head, measured in turn."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dyndet.errors import UserError
from dyndet.models.detectors.base import ChainedHead, Detector, SwitchableHead, TwinnedHead, routed_part
from dyndet.models.detectors.pyramid import PyramidDetector
from dyndet.ops.sparse import Impl
from dyndet.structures import Batch, ImageBatch


@dataclass(frozen=True)
class HeadTiming:
    """The head's time divided by that of its fixed twin: the head without gates, of the same size and weights.

    Attributes:
        ratio: median over batches.
        batches: number of batches, each timed `rounds` times in turn.
    """

    ratio: float
    batches: int


@torch.no_grad()
def time_head(detector: PyramidDetector, batches: Iterable[Batch], *, impl: Impl, rounds: int = 3) -> HeadTiming:
    """Times the head of a detector, of a chain the part that routes, in turn with its fixed twin on the same features.

    Args:
        detector: in eval mode.
        batches: real data, since the masks decide.
        impl: the execution of the head, where it has several.
        rounds: pairs per batch; the first pair of all warms up and is dropped.

    Raises:
        UserError: if the head has no fixed twin.
    """
    head = routed_part(detector.head)
    if not isinstance(head, TwinnedHead):
        raise UserError("this detector's head has no fixed twin to compare its time with")
    heads = {"routed": head, "fixed": head.fixed_twin()}
    before = head.execute(impl) if isinstance(head, SwitchableHead) else None
    ratios = []
    try:
        warm = False
        for batch in batches:
            features, valid = detector.pyramid(batch.images)
            if isinstance(detector.head, ChainedHead):
                features = detector.run_part("head", detector.head.lead, features, valid)
            pairs = []
            for _ in range(rounds + (not warm)):
                seconds = {}
                for name, timed in heads.items():
                    _wait(features[0].device)
                    start = time.perf_counter()
                    detector.run_part("head", timed, features, valid)
                    _wait(features[0].device)
                    seconds[name] = time.perf_counter() - start
                pairs.append(seconds["routed"] / seconds["fixed"])
            ratios.append(statistics.median(pairs[not warm :]))
            warm = True
    finally:
        if isinstance(head, SwitchableHead) and before is not None:
            head.execute(before)
    return HeadTiming(statistics.median(ratios), len(ratios))


@torch.no_grad()
def time_detections(
    detector: Detector, images: Sequence[ImageBatch], settings: Mapping[str, Callable[[], None]], *, rounds: int = 3
) -> dict[str, float]:
    """Milliseconds per image of a whole detection, pixels to boxes, mean over images of their median.

    All settings take their turns on every image, so that a machine that slows down slows all of them. On a CPU, blocks
    of up to 30 MiB come from memory the process keeps, whatever it ran before.

    Args:
        detector: in eval mode.
        images: batches of one image each.
        settings: what to call before a detection, by name.
        rounds: detections per image and setting; one more of all, on the first image, warms up.
    """
    device = next(detector.parameters()).device
    torch.empty(30 << 20, dtype=torch.uint8)  # freed at once: from now on glibc keeps what smaller blocks leave
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    for number, image in enumerate(images):
        times: dict[str, list[float]] = {name: [] for name in settings}
        for turn in range(rounds + (number == 0)):
            for name, prepare in settings.items():
                prepare()
                _wait(device)
                start = time.perf_counter()
                detector.detect(image)
                _wait(device)
                if number or turn:
                    times[name].append(time.perf_counter() - start)
        for name, values in times.items():
            seconds[name].append(statistics.median(values))
    return {name: 1000 * statistics.fmean(values) for name, values in seconds.items()}


def device_name(detector: Detector) -> str:
    """Where a detector computes, for reports."""
    device = next(detector.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
