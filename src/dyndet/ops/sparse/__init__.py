"""Sparse 3x3 convolution blocks on the rows of a pyramid: plan -> conv -> group_norm -> scatter_add.

    row         C channels of one position; a rows tensor ends with a row of zeros, "nothing there"
    position    y, x of one image at one level, numbered level by level, image by image (`RowLayout`); P of them
    segment     the positions of one image at one level; S of them
    plan        which positions are rows, in order (`Plan`)
    capacity    rows that a plan has room for: as many as are active, or P where only the device knows the number
    whole       a plan of all positions: rows are the map itself
    tap         one of the nine places that a 3x3 convolution reads
    reach       how far from an open gate a plan extends: 0 for its position alone, 1 for its 3x3 neighbourhood
    source,     the plan of what a convolution reads, and of what it computes
    target

What depends on gates is registered as operators (`torch.library`), so that export, compilation and counters see one
node each; they run in plain torch (`torch_backend`) or by the Triton kernels (`triton_backend`), see `Impl`.
"""

from dyndet.layout import RowLayout
from dyndet.ops.sparse.backend import IMPLS, Impl, Stats, SwitchableHead, autocast_dtype, check_impl, choose
from dyndet.ops.sparse.conv import conv, conv_work
from dyndet.ops.sparse.exchange import exchange, received
from dyndet.ops.sparse.gate_logits import gate_logits
from dyndet.ops.sparse.group_norm import Norm, group_norm
from dyndet.ops.sparse.plan import Plan, make_plans, whole_plan
from dyndet.ops.sparse.scatter_add import scatter_add
from dyndet.ops.sparse.tables import sending

__all__ = [
    "IMPLS",
    "Impl",
    "Norm",
    "Plan",
    "RowLayout",
    "Stats",
    "SwitchableHead",
    "autocast_dtype",
    "check_impl",
    "choose",
    "conv",
    "conv_work",
    "exchange",
    "gate_logits",
    "group_norm",
    "make_plans",
    "received",
    "scatter_add",
    "sending",
    "whole_plan",
]
