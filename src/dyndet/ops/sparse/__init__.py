"""Sparse 3x3 convolution blocks on the rows of a pyramid: plan -> convolve -> normalise -> place."""

from dyndet.layout import RowLayout
from dyndet.ops.sparse.conv import conv_rows, conv_work
from dyndet.ops.sparse.conv_norm import conv_norm_rows
from dyndet.ops.sparse.density import DensityEstimate, NodeDensity, counted_later
from dyndet.ops.sparse.depth_step import depth_rows
from dyndet.ops.sparse.direct import autocast_dtype
from dyndet.ops.sparse.exchange import exchange_rows
from dyndet.ops.sparse.execute.norm import Stats
from dyndet.ops.sparse.impl import IMPLS, Impl, SwitchableHead, check_impl, choose
from dyndet.ops.sparse.logits import logit_rows
from dyndet.ops.sparse.norm import norm_rows
from dyndet.ops.sparse.parameters import ConvNorm
from dyndet.ops.sparse.place import place_rows
from dyndet.ops.sparse.plan import Plan, make_plans, whole_plan
from dyndet.ops.sparse.scale_step import scale_rows, scale_work
from dyndet.ops.sparse.scatter import scatter_rows
from dyndet.ops.sparse.tables import sending

__all__ = [
    "IMPLS",
    "ConvNorm",
    "DensityEstimate",
    "Impl",
    "NodeDensity",
    "Plan",
    "RowLayout",
    "Stats",
    "SwitchableHead",
    "autocast_dtype",
    "check_impl",
    "choose",
    "conv_norm_rows",
    "conv_rows",
    "conv_work",
    "counted_later",
    "depth_rows",
    "exchange_rows",
    "logit_rows",
    "make_plans",
    "norm_rows",
    "place_rows",
    "scale_rows",
    "scale_work",
    "scatter_rows",
    "sending",
    "whole_plan",
]
