"""Triton kernels of masked sparse 3x3 convolution (installed as `dyndet.kernels`).

A pyramid of L levels and B images lies in memory as rows: level-major, image-minor, then y, then x; channels last. P
positions, S = L * B segments (one image at one level). A rows tensor is (R+1, C): row R stands for "nothing there",
counts as zero and is never read. The number of active rows lives on the device: no launcher waits for it, so that all
of them can be captured in a CUDA graph.
"""

from .conv import PositionNorm, conv, tile_rows
from .conv_backward import conv_weight_grad
from .depthwise import depthwise, depthwise_weight_grad
from .group_norm import Stats, group_norm
from .group_norm_backward import group_norm_backward
from .plan import Plan, plan, stacked_plans
from .scatter_add import scatter_add, scatter_add_backward

__all__ = [
    "Plan",
    "PositionNorm",
    "Stats",
    "conv",
    "conv_weight_grad",
    "depthwise",
    "depthwise_weight_grad",
    "group_norm",
    "group_norm_backward",
    "plan",
    "scatter_add",
    "scatter_add_backward",
    "stacked_plans",
    "tile_rows",
]
