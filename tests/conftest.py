"""Shared fixtures: single-threaded torch (two threads collapse on loaded machines) and the optional real data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import is_hypothesis_test, settings

settings.register_profile("dyndet", deadline=None)  # nothing fails because a machine is busy
settings.load_profile("dyndet")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure(config: pytest.Config) -> None:
    """Triton interprets kernels on the CPU, unless a GPU is asked for (`-m gpu`), where it compiles them.

    It decides when kernels are first imported, wherever that is.
    """
    on_gpu = torch.cuda.is_available() and config.option.markexpr == "gpu"
    os.environ.setdefault("TRITON_INTERPRET", "0" if on_gpu else "1")


def more_examples(function: Any, least: int) -> None:
    """Of a property, for `make reliability`."""
    name = "_hypothesis_internal_use_settings"
    given = getattr(function, name, None) or settings()
    if given.max_examples < least:
        setattr(function, name, settings(given, max_examples=least, deadline=None))


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Kernels that are compiled are tested on the GPU, too; what only a GPU can show is skipped elsewhere."""
    compiled = os.environ["TRITON_INTERPRET"] == "0"
    for function in {item.obj for item in items if isinstance(item, pytest.Function) and is_hypothesis_test(item.obj)}:
        more_examples(function, int(os.environ.get("DYNDET_EXAMPLES", "0")))
    for item in items:
        if compiled and "kernels" in item.path.parts:
            item.add_marker("gpu")
        elif not compiled and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and -m gpu"))


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
