"""The last convolution of YOLO predictors, with learned vectors around it (Wang et al., YOLOR, arXiv:2105.04206)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ImplicitConv(nn.Module):
    """`scale` * conv1x1(x + `add`), with one learned number per channel on either side; both fold into the convolution.

    Args:
        channels: of the features.
        outputs: of the convolution.
    """

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, outputs, 1)
        self.add = nn.Parameter(torch.empty(channels, 1, 1).normal_(0.0, 0.02))
        self.scale = nn.Parameter(torch.empty(outputs, 1, 1).normal_(1.0, 0.02))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, outputs, H, W)."""
        return self.scale * self.conv(x + self.add)

    @torch.no_grad()
    def fused(self) -> nn.Conv2d:
        """A plain convolution that computes the same, with weights of its own."""
        weight, bias = self.conv.weight, self.conv.bias
        assert bias is not None
        plain = nn.Conv2d(weight.shape[1], weight.shape[0], 1, device=weight.device, dtype=weight.dtype)
        moved = bias + weight[:, :, 0, 0] @ self.add.flatten()
        plain.load_state_dict({"weight": weight * self.scale[..., None], "bias": moved * self.scale.flatten()})
        return plain
