"""Convolution at active positions: one function, several executions.

`masked_conv(x, w, b, mask)` is `conv(x)` where `mask` is set and 0 elsewhere. Inputs are read everywhere: the mask
selects outputs only (unlike submanifold convolution, which also drops inactive inputs). For several levels, or several
convolutions in a row, `dyndet.ops.sparse` keeps what lies between them sparse too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dyndet.ops.sparse import (
    Impl,
    RowLayout,
    autocast_dtype,
    check_impl,
    choose,
    conv_rows,
    make_plans,
    scatter_rows,
    whole_plan,
)


def masked_conv(
    inputs: Tensor, weight: Tensor, bias: Tensor | None = None, *, mask: Tensor, density: float | None = None,
    impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Same-size, stride-1 3x3 convolution at the positions of a mask; differentiable.

    Args:
        inputs: (B, C, H, W).
        weight: (O, C, 3, 3).
        bias: (O,) or None.
        mask: (B, 1, H, W) bool, the outputs to compute.
        density: share of active positions to expect, for "auto" where reading the mask would make the host wait
            (CUDA, `torch.compile`); None measures it on the CPU and expects few elsewhere.
        impl: see `dyndet.ops.sparse.Impl`.

    Returns:
        (B, O, H, W), channels-last where sparse, zero where the mask is not set.

    Raises:
        ValueError: on another kernel, a mask of another size or type, or an unknown `impl`.
    """
    if weight.ndim != 4 or weight.shape[1:] != (inputs.shape[1], 3, 3):
        raise ValueError(f"weight must be (O, {inputs.shape[1]}, 3, 3), got {tuple(weight.shape)}")
    if mask.shape != (inputs.shape[0], 1, *inputs.shape[2:]):
        raise ValueError(f"mask {tuple(mask.shape)} does not fit inputs {tuple(inputs.shape)}")
    check_impl(impl)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}: compare, for instance gate > 0")
    whole = False
    if density is None and mask.device.type == "cpu" and not torch.compiler.is_compiling():
        density = float(mask.sum()) / max(1, mask.numel())
        whole = density == 1
    how = choose(impl, density, inputs.shape[1], autocast_dtype(inputs), inputs.device)
    if how == "dense" or inputs.is_meta:  # tensors without values, as used for counting, have no active rows
        outputs = F.conv2d(inputs, weight, bias, padding=1)
        return outputs if whole else outputs.masked_fill(~mask, 0)  # a product would keep NaN
    layout = RowLayout.of([inputs])
    (plan,) = make_plans(layout.flat([mask])[0], layout, expected=density, impl=how)
    rows = conv_rows(layout.rows([inputs]), weight, bias, source=whole_plan(layout), target=plan, impl=how)
    return layout.maps(scatter_rows(rows, plan))[0]
