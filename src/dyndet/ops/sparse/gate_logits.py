"""Convolution of the map to very few channels, differentiable: the logits of gates; in plain torch on every device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dyndet.layout import RowLayout
from dyndet.ops.sparse import torch_backend
from dyndet.ops.sparse.backend import autocast_dtype
from dyndet.ops.sparse.operator import operator


def gate_logits(x: Tensor, weight: Tensor, layout: RowLayout) -> Tensor:
    """Same-size convolution of map rows to a few channels.

    Args:
        x: (P + 1, C) rows of the map, the last one zero.
        weight: (O, C, k, k), k = 1 or 3.
        layout: of the rows.

    Returns:
        (O, P), at least float32.
    """
    dtype = autocast_dtype(x)
    return _gate_logits(x.to(dtype), weight.to(dtype), layout.sizes)


def _forward(x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
    return torch_backend.gate_logits(x, weight, RowLayout.from_sizes(sizes, x.device))


def _fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(len(weight), len(x) - 1, dtype=torch.promote_types(x.dtype, torch.float32))


def _backward(
    grad: Tensor, needs: list[bool], outputs: list[Tensor], x: Tensor, weight: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    return torch_backend.gate_logits_backward(grad, x, weight, RowLayout.from_sizes(sizes, x.device))


_gate_logits = operator("gate_logits", _forward, _fake, _backward, inputs=2)


@register_flop_formula(torch.ops.dyndet.gate_logits)
def _flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two per multiply-add."""
    outputs, channels, height, width = weight
    return 2 * (x[0] - 1) * outputs * channels * height * width
