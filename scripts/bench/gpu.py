"""What only a CUDA device can tell: graph replay, host syncs, launches."""

from __future__ import annotations

import warnings

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .timing import Run


def graphed(run: Run) -> Run:
    """The same work as one replay of a CUDA graph; inputs and outputs stay where they are."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, chooses algorithms, fills caches: nothing of that can be captured
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> object:
        graph.replay()
        return output

    return replay


def syncs(run: Run) -> int:
    """How often the host waits for the device (goal G1)."""
    run()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
            return 0
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
        return max(1, sum("synchroniz" in str(item.message) for item in caught))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def launches(run: Run) -> int:
    """Kernels, copies and fills that one call starts on the device (goal G2); 0 where the profiler sees none."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in trace.events() or ())
