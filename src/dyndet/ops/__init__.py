"""Functions on tensors; nothing here knows a model."""

from dyndet.ops.conv import masked_conv

__all__ = ["masked_conv"]
