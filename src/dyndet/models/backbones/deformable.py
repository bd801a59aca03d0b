"""Deformable convolutions in place of a ResNet's own (DCN v2: Zhu et al., CVPR 2019, arXiv:1811.11168)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dyndet.errors import UserError
from dyndet.models.heads.init import fill_bias
from dyndet.ops.deform_conv import modulated_deform_conv


class DeformConv(nn.Module):
    """A modulated deformable convolution that predicts its own offsets and masks.

    The `offset` convolution starts at zero: no offsets and masks of one half, so that the output starts as half of the
    plain convolution's.

    Args:
        conv: an undilated K x K convolution, K odd, whose parameters, stride and groups it takes over.

    Raises:
        ValueError: on any other convolution.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        size, stride = conv.kernel_size[0], conv.stride[0]
        plain = (size % 2, conv.kernel_size, conv.stride, conv.dilation, conv.padding)
        if plain != (1, (size, size), (stride, stride), (1, 1), (size // 2, size // 2)):
            raise ValueError(f"only a square, undilated, padded convolution can become deformable, not {conv}")
        self.weight = conv.weight
        self.bias = conv.bias
        self.stride = stride
        self.taps = size**2
        self.offset = nn.Conv2d(conv.in_channels, 3 * self.taps, size, stride, size // 2).to(conv.weight)
        nn.init.zeros_(self.offset.weight)
        fill_bias(self.offset, 0.0)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, ceil(H / stride), ceil(W / stride)), computed in float32, in the dtype of `inputs`."""
        offset, logits = self.offset(inputs).split([2 * self.taps, self.taps], 1)
        outputs = modulated_deform_conv(inputs, offset, logits.sigmoid(), self.weight, self.bias, stride=self.stride)
        return outputs.to(inputs.dtype)


def deform_stages(body: nn.Module, stages: Sequence[int]) -> None:
    """Makes the 3x3 convolutions of some stages of a timm ResNet or ResNeXt deformable, with the weights they have.

    Args:
        body: timm's model or its feature extractor.
        stages: 2 to 5 for c2 to c5.

    Raises:
        UserError: where the model has no such stage or no 3x3 convolution in it.
    """
    for stage in stages:
        layer = getattr(body, f"layer{stage - 1}", None)
        blocks = layer.modules() if isinstance(layer, nn.Module) else ()
        found = [
            (block, name, conv)
            for block in blocks
            for name, conv in block.named_children()
            if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3)
        ]
        if not found:
            raise UserError(
                f"backbone.deformable_stages: there are no 3x3 convolutions in a stage c{stage} of this backbone. "
                "Take stages among 2 to 5 of a ResNet or ResNeXt, up to its coarsest stride"
            )
        for block, name, conv in found:
            setattr(block, name, DeformConv(conv))
