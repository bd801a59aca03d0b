"""What timm's Swin (Liu et al., ICCV 2021, arXiv:2103.14030) needs to work on maps of any size, as detectors use it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

ANY_SIZE = {"strict_img_size": False, "always_partition": True}
"""Arguments of timm: take any size, and keep window and shift whatever it is."""


class PaddedBlock(SwinTransformerBlock):
    """A block that pads its map to whole windows before the cyclic shift.

    timm pads after it. Where something is padded, its shifted windows then join opposite borders of the map, which the
    attention mask no longer tells apart.
    """

    def _attn(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        rows, columns = self.window_size
        padded = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        return super()._attn(padded)[:, :height, :width]


def is_swin(body: nn.Module) -> bool:
    """Whether it is built of Swin's blocks (of the first version)."""
    return any(isinstance(layer, SwinTransformerBlock) for layer in body.modules())


def pad_windows(body: Any) -> None:
    """Prepares timm's feature extractor of a Swin, made with `ANY_SIZE`, for images and maps of any size."""
    body.patch_embed.dynamic_img_pad = True
    for layer in body.modules():
        if isinstance(layer, SwinTransformerBlock):
            layer.__class__ = PaddedBlock  # its state is the same
