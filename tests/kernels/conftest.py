"""Kernels on a GPU when there is one, otherwise in the Triton interpreter, which must be chosen before the import."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
