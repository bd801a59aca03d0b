"""dyndet: dynamic object detection. Detectors whose compute follows the input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "build_detector", "load_detector"]

if TYPE_CHECKING:
    from dyndet.api import build_detector, load_detector


def __getattr__(name: str) -> Any:
    # Lazy: `import dyndet` alone must not import torch.
    if name in ("build_detector", "load_detector"):
        from dyndet import api

        return getattr(api, name)
    raise AttributeError(f"module 'dyndet' has no attribute {name!r}")
