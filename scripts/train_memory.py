"""Peak memory of one training step of an experiment: random weights, one random image.

For instance `python scripts/train_memory.py dyhead_atss_r50_simple head.checkpointing=true --size 800 1333`.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import torch

from dyndet import build_detector


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("experiment")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. head.checkpointing=true")
    parser.add_argument("--size", nargs=2, type=int, default=(800, 1333), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    detector = build_detector(arguments.experiment, arguments.overrides).to(device).train()
    images = torch.rand(arguments.batch, 3, *arguments.size, device=device)
    boxes = torch.tensor([[50.0, 50, 300, 250], [400, 100, 700, 600]], device=device)
    target = {"boxes": boxes, "labels": torch.tensor([0, 1], device=device)}
    before, start = _peak(device), time.perf_counter()
    losses = detector.losses(list(images), [target] * arguments.batch)
    losses.total.backward()
    seconds = time.perf_counter() - start
    words = " ".join([arguments.experiment, *arguments.overrides])
    print(f"{words}: peak {_peak(device):.2f} GiB ({before:.2f} before the step), {seconds:.1f} s, {device}")


def _peak(device: str) -> float:
    """GiB: allocated on the GPU, or resident in this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


if __name__ == "__main__":
    main()
