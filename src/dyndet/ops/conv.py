"""Convolution on active positions: one function, several executions.

`masked_conv(x, w, b, mask)` is `conv(x)` where `mask` is set and 0 elsewhere. Inputs are read everywhere: the mask
selects outputs only (unlike submanifold convolution, which also drops inactive inputs).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Impl = Literal["auto", "dense", "gather"]

# Above this share of active positions the dense convolution wins (gather pays for moving nine rows per output).
GATHER_BELOW = 0.5


def masked_conv(
    inputs: Tensor, weight: Tensor, bias: Tensor | None = None, *, mask: Tensor, impl: Impl = "auto"
) -> Tensor:
    """Same-size, stride-1 convolution at the positions of a mask.

    Args:
        inputs: (B, C, H, W).
        weight: (O, C, k, k), k odd.
        bias: (O,) or None.
        mask: (B, 1, H, W) bool, the outputs to compute.
        impl: "dense" computes everything and masks it (the reference, differentiable); "gather" computes the active
            rows alone (differentiable too); "auto" trains dense and, without gradients, gathers below half density.

    Returns:
        (B, O, H, W), zero where the mask is not set.

    Raises:
        ValueError: on an even kernel, a mask of another size, or an unknown `impl`.
    """
    kernel = weight.shape[-1]
    if weight.ndim != 4 or kernel % 2 == 0 or weight.shape[-2] != kernel:
        raise ValueError(f"weight must be (O, C, k, k) with odd k, got {tuple(weight.shape)}")
    if mask.shape != (inputs.shape[0], 1, *inputs.shape[2:]):
        raise ValueError(f"mask {tuple(mask.shape)} does not fit inputs {tuple(inputs.shape)}")
    if impl == "auto" and not inputs.is_meta:
        sparse = not torch.is_grad_enabled() and float(mask.float().mean()) < GATHER_BELOW
        impl = "gather" if sparse else "dense"
    if impl == "dense" or inputs.is_meta:  # tensors without values, as used for counting, have no active rows
        return F.conv2d(inputs, weight, bias, padding=kernel // 2) * mask
    if impl == "gather":
        return _gather(inputs, weight, bias, mask)
    raise ValueError(f"impl must be auto, dense or gather, got {impl!r}")


def _gather(inputs: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    batch, channels, height, width = inputs.shape
    out_channels, kernel = weight.shape[0], weight.shape[-1]
    if torch.is_autocast_enabled(inputs.device.type):
        dtype = torch.get_autocast_dtype(inputs.device.type)
        inputs, weight, bias = inputs.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    radius = kernel // 2
    # Channels-last rows of the padded map: a tap is then a shift of the row number.
    padded_height, padded_width = height + 2 * radius, width + 2 * radius
    rows = F.pad(inputs, (radius,) * 4).permute(0, 2, 3, 1).reshape(-1, channels)
    image, y, x = mask[:, 0].nonzero(as_tuple=True)
    corner = (image * padded_height + y) * padded_width + x
    taps = torch.arange(kernel, device=inputs.device)
    offsets = (taps[:, None] * padded_width + taps).flatten()
    columns = rows[(corner[:, None] + offsets).flatten()].view(-1, kernel * kernel * channels)
    active = F.linear(columns, weight.permute(0, 2, 3, 1).reshape(out_channels, -1), bias)
    outputs = active.new_zeros(batch, height, width, out_channels)
    outputs = outputs.index_put((image, y, x), active)
    return outputs.permute(0, 3, 1, 2)
