"""Group normalisation (Wu and He, ECCV 2018, arXiv:1803.08494) whose statistics come from the active positions only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_group_norm(
    inputs: Tensor, num_groups: int, weight: Tensor, bias: Tensor, *, mask: Tensor | None, eps: float = 1e-5
) -> Tensor:
    """GroupNorm over the positions of a mask.

    With dense statistics the result at a position depends on positions that sparse execution never computes; with
    active statistics training and sparse inference are the same function.

    Args:
        inputs: (B, C, H, W).
        num_groups: divides C.
        weight: (C,) scale.
        bias: (C,) shift.
        mask: (B, 1, H, W) bool, the positions that exist; None takes the whole map.
        eps: added to the variance.

    Returns:
        (B, C, H, W), zero where the mask is not set; all zero for an image without active positions.
    """
    if mask is None:
        outputs = F.group_norm(inputs, num_groups, weight, bias, eps)
        last = torch.channels_last  # some versions of torch leave this layout on CUDA, and convolutions then suffer
        return outputs.contiguous(memory_format=last) if inputs.is_contiguous(memory_format=last) else outputs
    batch, channels, height, width = inputs.shape
    active = mask.float()
    # Statistics in float32, in two passes: E[x^2] - E[x]^2 cancels when the mean is large.
    groups = inputs.float().reshape(batch, num_groups, -1, height, width)
    share = active.unsqueeze(1)
    count = (active.sum((1, 2, 3)) * (channels // num_groups)).clamp(min=1).view(batch, 1, 1, 1, 1)
    mean = (groups * share).sum((2, 3, 4), keepdim=True) / count
    centred = (groups - mean) * share
    variance = centred.square().sum((2, 3, 4), keepdim=True) / count
    normal = (centred * torch.rsqrt(variance + eps)).reshape(batch, channels, height, width)
    outputs = normal * weight.float().view(1, -1, 1, 1) + bias.float().view(1, -1, 1, 1) * active
    return outputs.to(inputs.dtype)
