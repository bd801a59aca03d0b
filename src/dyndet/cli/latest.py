"""The newest run of a name."""

from __future__ import annotations

import glob
from pathlib import Path


def latest_run(name: str, root: str = "outputs") -> Path | None:
    """Folder of the newest run of an experiment that has a last checkpoint."""
    found = sorted(
        Path(root).glob(f"{glob.escape(name)}/*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime
    )
    return found[-1].parent.parent if found else None
