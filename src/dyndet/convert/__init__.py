"""Released checkpoints -> ours: mmdetection, detectron2 (the DyHead authors), cvpods (the fine-grained head's authors),
CBNetV2, DynamicDet and YOLOv7.

What a source's tensors are called and how a release is recognised is in `mmdet.py`, `cbnet.py`, `detectron2.py`,
`cvpods.py` and `dynamicdet.py`; `engine.py` applies such a table and accounts for every tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Converted", "load_release", "read_release", "save_release"]

if TYPE_CHECKING:
    from dyndet.convert.release import Converted, load_release, read_release, save_release


def __getattr__(name: str) -> Any:
    # Lazy: importing the package alone must not import torch.
    if name in __all__:
        from dyndet.convert import release

        return getattr(release, name)
    if name == "convert_checkpoint":
        from dyndet.errors import UserError

        raise UserError("convert_checkpoint left out settings that its weights need: use dyndet.load_release(path)")
    raise AttributeError(f"module 'dyndet.convert' has no attribute {name!r}")
