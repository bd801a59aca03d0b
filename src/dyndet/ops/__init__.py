"""Functions on tensors; nothing here knows a model."""
