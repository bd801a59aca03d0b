"""dyndet: dynamic object detection. Detectors whose compute follows the input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dyndet import moved

__version__ = "0.1.0"
__all__ = ["__version__", "build_detector", "load_detector", "load_release"]

if TYPE_CHECKING:
    from dyndet.api import build_detector, load_detector
    from dyndet.convert import load_release

moved.install()


def __getattr__(name: str) -> Any:
    # Lazy: `import dyndet` alone must not import torch.
    if name in ("build_detector", "load_detector"):
        from dyndet import api

        return getattr(api, name)
    if name == "load_release":
        from dyndet import convert

        return convert.load_release
    raise AttributeError(f"module 'dyndet' has no attribute {name!r}")
