"""Shared fixtures: single-threaded torch (two threads collapse on loaded machines) and the optional real data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # read when kernels are first imported, wherever that is
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


def _folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"no real {name} beside the checkout (../shared/{name})")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real detection sets; skips when it is not there."""
    return _folder("data")


@pytest.fixture(scope="session")
def shared_weights() -> Path:
    """Folder with the real ImageNet weights; skips when it is not there."""
    return _folder("weights")
