"""Dense against gather execution of the masked 3x3 convolution and of the depth block: paired timings on this machine.

usage: python scripts/bench_sparse.py [--size 100 168] [--channels 256] [--rounds 7]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from dyndet.models.heads.paths import DepthPath
from dyndet.ops import masked_conv
from dyndet.structures import ConvCost, PathGate


def blob_gate(density: float, height: int, width: int, generator: torch.Generator) -> Tensor:
    """A gate open on compact blobs, as objects make them: (1, 1, H, W) of 0 and 1."""
    coarse = torch.rand(1, 1, -(-height // 4), -(-width // 4), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    threshold = smooth.flatten().quantile(1 - density)
    return (smooth > threshold).float()


def seconds(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(dense: Callable[[], Tensor], sparse: Callable[[], Tensor], rounds: int) -> float:
    """Median of dense time / sparse time, each pair measured back to back."""
    for warm_up in (dense, sparse):
        warm_up()
    return statistics.median(seconds(dense) / seconds(sparse) for _ in range(rounds))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", nargs=2, type=int, default=[100, 168])
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    height, width = arguments.size
    generator = torch.Generator().manual_seed(0)
    block = DepthPath(arguments.channels, 32).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(1, arguments.channels, height, width, generator=generator)
    x = x.to(memory_format=torch.channels_last)
    weight = block.conv1.weight
    print(f"{arguments.channels} channels, {height} x {width}, float32, {torch.get_num_threads()} threads")
    heads = ("gate density", "dilated", "conv: dense/gather", "block: dense/gather", "MACs: dense/used")
    print("".join(f"{head:>20}" for head in heads))
    for density in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7):
        gate = PathGate("n", "depth", 0, blob_gate(density, height, width, generator), (ConvCost(1, 1), ConvCost(1, 0)))
        inner, outer = gate.mask(1), gate.mask(0)
        conv = compare(
            lambda: torch.nn.functional.conv2d(x, weight, padding=1),
            lambda outer=outer: masked_conv(x, weight, mask=outer, impl="gather"),
            arguments.rounds,
        )
        whole = compare(
            lambda: block(x),
            lambda inner=inner, outer=outer: block.masked(x, inner, outer, "gather"),
            arguments.rounds,
        )
        used = 2 / float(inner.float().mean() + outer.float().mean())
        print(f"{density:>20.0%}{float(inner.float().mean()):>20.0%}{conv:>19.2f}x{whole:>19.2f}x{used:>19.2f}x")


if __name__ == "__main__":
    main()
