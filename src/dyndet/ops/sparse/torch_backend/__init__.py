"""The sparse operations in plain torch, without autograd; `triton_backend` has these functions as well.

They take plans as they are; rows of a plan from its count on are neither read nor defined. NAME_backward(grad, needs,
outputs, *arguments of NAME) returns the gradients of its first arguments, see `operator`.
"""

from dyndet.ops.sparse.torch_backend.conv import conv, conv_backward
from dyndet.ops.sparse.torch_backend.group_norm import group_norm, group_norm_backward
from dyndet.ops.sparse.torch_backend.plan import plan
from dyndet.ops.sparse.torch_backend.scatter_add import scatter_add, scatter_add_backward

__all__ = [
    "conv",
    "conv_backward",
    "group_norm",
    "group_norm_backward",
    "plan",
    "scatter_add",
    "scatter_add_backward",
]
