"""Modulated deformable convolution (Zhu et al., DCN v2, CVPR 2019) through torchvision's operator."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torchvision.ops import deform_conv2d


def modulated_deform_conv(
    inputs: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1
) -> Tensor:
    """y(p) = sum over taps k of mask_k(p) W_k x(stride p + k + offset_k(p)), bilinear, 0 outside the map.

    Runs in float32 (float64 stays) also under autocast: the operator has no bfloat16 on a CPU, and the weight would
    not follow the inputs.

    Args:
        inputs: (B, C, H, W).
        offset: (B, 2 K^2, h, w), (dy, dx) of each tap, row-major, in positions of `inputs`.
        mask: (B, K^2, h, w), usually in 0..1.
        weight: (O, C / groups, K, K), K odd; the groups follow from its shape.
        bias: (O,) or None.
        stride: of the outputs.

    Returns:
        (B, O, h, w) in float32, or float64 where `inputs` are.
    """
    dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    counting = inputs.is_meta  # tensors without values know no autocast
    with nullcontext() if counting else torch.autocast(inputs.device.type, enabled=False):
        return deform_conv2d(
            inputs.to(dtype),
            offset.to(dtype),
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
            stride=(stride, stride),
            padding=(weight.shape[-1] // 2, weight.shape[-1] // 2),
            mask=mask.to(dtype),
        )
