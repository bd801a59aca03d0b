"""What a configuration refers to by name: a job is done only as long as these files are what they were."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from dyndet.cli.latest import latest_checkpoint

_ANNOTATIONS = (".json", ".txt", ".xml", ".yaml", ".yml", ".csv", ".data")
MOST = 20_000
"""So many files of annotations are looked at."""


def named_files(config: Any) -> list[list[Any]]:
    """Path, size and time of the last change of the files that a configuration names; absent ones are left out.

    Args:
        config: resolved, as plain containers. Of the folder `data.root`, annotations count.
    """
    paths = sorted({Path(text) for text in _texts(config) if 0 < len(text) < 1000 and "\0" not in text})
    data = config.get("data")
    root = data.get("root") if isinstance(data, dict) else None
    if isinstance(root, str):
        paths += islice(_annotations(Path(root)), MOST)
    if config.get("ckpt_path") == "last":
        latest, _ = latest_checkpoint(f"{config.get('name')}{config.get('step', '')}")
        paths += [latest] if latest else []
    return [item for path in paths if (item := _described(path)) is not None]


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    for part in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _texts(part)


def _annotations(root: Path) -> Iterator[Path]:
    """In a fixed order; nothing of a folder that is not there."""
    for folder, inside, files in os.walk(root):
        inside.sort()
        yield from (Path(folder, name) for name in sorted(files) if name.lower().endswith(_ANNOTATIONS))


def _described(path: Path) -> list[Any] | None:
    try:
        return [str(path), path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else None
    except (OSError, RuntimeError):
        return None
