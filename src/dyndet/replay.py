"""`dyndet replay file=RUN/dump_step_000123.pt`: runs a step again that a guarded run left out, and says where it broke.

Training writes such a file when the loss or a gradient is no number, see `dyndet.lightning.divergence`.
"""

from __future__ import annotations

import sys

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from dyndet.checkpoints.read import take_weights
from dyndet.cli.command import run
from dyndet.cli.compose import build
from dyndet.cli.device import device_of
from dyndet.errors import UserError, reason
from dyndet.lightning.dump import Dump, Seen, read_dump
from dyndet.lightning.nonfinite import first_lost
from dyndet.lightning.router_module import Lesson, RouterModule, learn
from dyndet.lightning.trace import Trace, in_precision, look_at_gradients, look_at_loss, lost, traced
from dyndet.models.detectors.base import Detector
from dyndet.models.dynamicdet.offset import Offset, make_offset, router_loss
from dyndet.structures import Batch


def replay(config: DictConfig) -> Trace:
    """Runs a step again and prints what is seen.

    Raises:
        UserError: if the file is no dump, or cannot be run.
        SystemExit: with code 1 if loss and gradients are numbers this time.
    """
    device = device_of(config.device)
    dump = read_dump(config.file, trust=config.trust)
    detector: Detector = build(dump.saved.config.detector)
    try:
        take_weights(detector, dump.saved.weights)
        if dump.saved.config.channels_last:
            nn.Module.to(detector, memory_format=torch.channels_last)
        detector.to(device).train()
        print(f"step {dump.step} of {dump.saved.config.get('name', '?')} in {dump.precision}: {dump.fault}")
        given = _given(detector, dump)
        for line in given:
            print(f"before: {line}")
        trace = _again(detector, dump, device)
    except (RuntimeError, LookupError, AttributeError, TypeError) as error:
        raise UserError(f"file={config.file} cannot be run again: {reason(error)}") from error
    for line in trace.lines():
        print(line)
    if not (trace.found() or given):
        print("not reproduced: loss and gradients are numbers this time, so it was not this model on this batch alone: "
              "other hardware or libraries, a callback, a device that made a mistake")  # fmt: skip
        raise SystemExit(1)
    print("reproduced")
    return trace


def _given(detector: nn.Module, dump: Dump) -> list[str]:
    """What was wrong already."""
    found = []
    if name := first_lost(detector.named_parameters()):
        found.append(f"the weights {name} are no numbers")
    for seen in dump.batches:
        found += [f"{name} are no numbers" for name, value in seen.given() if lost(value)]
    return found


def _again(detector: Detector, dump: Dump, device: torch.device) -> Trace:
    """All batches of the step, forward and backward."""
    router = dump.saved.config.get("router_loss")
    offset: Offset | None = None
    if router is not None and dump.offset is not None:
        offset = make_offset(router.offset, weight=router.weight, differences=torch.zeros(1))
        offset.restore(dump.offset)
        RouterModule(detector, offset=offset, categories=dump.saved.categories)  # type: ignore[arg-type]  # its modes
    with traced(detector) as trace:
        for seen in dump.batches:
            _seed(seen, device)
            with in_precision(dump.precision, device):
                terms = _terms(detector, seen.batch, offset, device)
            look_at_loss(trace, terms)
            (torch.stack(list(terms.values())).sum() / len(dump.batches)).backward()
            look_at_gradients(trace, detector)
    return trace


def _terms(detector: Detector, batch: Batch | Lesson, offset: Offset | None, device: torch.device) -> dict[str, Tensor]:
    if offset is None:
        assert isinstance(batch, Batch)
        moved = batch.to(device)
        return detector.losses(moved.images, moved.targets).terms
    if isinstance(batch, Batch):
        lesson = learn(detector, batch.to(device))  # type: ignore[arg-type]
    else:
        lesson = Lesson(batch.pooled.to(device), batch.losses.to(device))
    difficulty = detector.difficulty(lesson.pooled)  # type: ignore[operator]
    now = offset((lesson.losses[0] - lesson.losses[1]).cpu())
    return {"loss": router_loss(difficulty, lesson.losses, now)}


def _seed(seen: Seen, device: torch.device) -> None:
    torch.set_rng_state(seen.random["cpu"].cpu())
    if device.type == "cuda" and "cuda" in seen.random:
        torch.cuda.set_rng_state(seen.random["cuda"].cpu())


if __name__ == "__main__":
    sys.argv[1:] = [item if "=" in item or item.startswith("-") else f"file={item}" for item in sys.argv[1:]]
    run(replay, "replay")
