"""What to predict on: images, folders of them, globs, lists, videos and cameras."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

from dyndet.data.images import SUFFIXES, UNREAD
from dyndet.data.user_paths import lies_there, user_path
from dyndet.errors import UserError
from dyndet.structures import Sample, Target

logger = logging.getLogger(__name__)

T = TypeVar("T")

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".ts", ".3gp"})
"""Of files that count as videos."""


@dataclass(frozen=True)
class Source:
    """One file, or a camera.

    Attributes:
        path: as given; of a camera its number.
        kind: what it is, by its name: "video" and "camera" need PyAV.
        name: for what is written about it, with folders and without a suffix; no two sources share one.
    """

    path: str
    kind: Literal["image", "video", "camera"]
    name: str


def find_sources(given: str | int | Sequence[str | int], *, leave_out: str | Path | None = None) -> list[Source]:
    """What a path names, each file once; sorted inside folders and globs.

    Args:
        given: an image or a video; a folder, of which all images and videos are taken, those of its folders, too, and
            nothing hidden; a glob, in which `**` stands for any folders; a text file with such a path per line, as seen
            from there; the number of a camera; or a list of all that. What is named itself need not be there: reading
            it will say so.
        leave_out: a folder inside the others, for what is written.

    Raises:
        UserError: if there is nothing, or on addresses of the web.
    """
    items = [given] if isinstance(given, str | int) else list(given)
    cameras = [int(item) for item in items if _is_camera(item)]
    if cameras and len(items) > 1:
        raise UserError(f"source={cameras[0]}: a camera never ends, so nothing can come after it; give it alone")
    if cameras:
        return [Source(str(cameras[0]), "camera", f"camera_{cameras[0]}")]
    skip = None if leave_out is None else os.path.realpath(leave_out)
    paths = list(dict.fromkeys(path for item in items for path in _paths(str(item), skip, named=len(items) > 1)))
    unread = Counter(suffix for item in items for suffix in _unread(str(item)))
    left = f"{unread.total()} files of formats that are not read ({', '.join(sorted(unread))}): convert them to JPEG"
    if not paths:
        text = given if isinstance(given, str) else f"[{','.join(map(str, items))}]"
        advice = "give an image, a folder, a quoted glob, a text file of paths, or a video"
        raise UserError(f"source={text}: no images there; {left if unread else advice}")
    if unread:
        logger.warning("left out: %s", left)
    return [
        Source(str(path), "video" if path.suffix.lower() in VIDEO_SUFFIXES else "image", name)
        for path, name in zip(paths, _names(paths), strict=True)
    ]


def unlabelled(image: Tensor, path: str) -> Sample:
    """A uint8 (3, H, W) image as a sample without objects, ready for the transforms of evaluation."""
    none = torch.zeros(0, dtype=torch.int64)
    size = (int(image.shape[1]), int(image.shape[2]))
    return Sample(image, Target(torch.zeros(0, 4), none, none.bool(), original_size=size, path=path))


def _is_camera(item: str | int) -> bool:
    return isinstance(item, int) or (item.isdecimal() and not Path(item).exists())


def _paths(item: str, skip: str | None, *, named: bool, lists: bool = True) -> Iterable[Path]:
    """Of one entry; `named`: it stands in a list, where what is not there is reported when it is read."""
    if re.match(r"[a-z][a-z0-9+.-]+://", item, re.IGNORECASE):
        raise UserError(f"source={item}: addresses are not read; fetch the file first (curl -LO {item}) and name it")
    path = user_path(item)
    if path.is_dir():
        return _in_folder(path, skip)
    if path.is_file():
        return _listed(path, skip) if path.suffix.lower() == ".txt" and lists else [path]
    found = sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207 - absolute globs too
    if found:
        readable = [file for file in found if file.suffix.lower() in SUFFIXES | VIDEO_SUFFIXES]
        return [file for file in readable if skip is None or not Path(os.path.realpath(file)).is_relative_to(skip)]
    return [path] if named else []


def _in_folder(folder: Path, skip: str | None) -> list[Path]:
    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen or real == skip:  # links may go round in circles
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in files if _suffix(name) in SUFFIXES | VIDEO_SUFFIXES]
    return sorted(found)


def _unread(item: str) -> list[str]:
    """Suffixes of images in a folder that are left out."""
    folder = user_path(item)
    if not folder.is_dir():
        return []
    return [suffix for _, _, names in os.walk(folder) for name in names if (suffix := _suffix(name)) in UNREAD]


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - of many names


def _listed(file: Path, skip: str | None) -> Iterator[Path]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"source={file} is no text file with a path per line: {error}") from error
    for line in filter(None, map(str.strip, lines)):
        beside = file.parent / user_path(line)
        item = str(beside) if lies_there(beside) or not lies_there(Path(line)) else line
        yield from _paths(line if "://" in line else item, skip, named=True, lists=False)


def _names(paths: Sequence[Path]) -> list[str]:
    """Below the folder that all share; with the suffix where two differ in nothing else."""
    whole = [Path(os.path.abspath(path)) for path in paths]  # noqa: PTH100 - links stay as they are called
    try:
        root = Path(os.path.commonpath([path.parent for path in whole]))
        below = [path.relative_to(root) for path in whole]
    except ValueError:  # two drives
        below = [Path(path.name) for path in whole]
    names = [path.with_suffix("").as_posix() for path in below]
    names = [name if alone else f"{name}_{path.suffix[1:]}" for name, path, alone in _alone(names, below)]
    return [name if alone else f"{name}_{number}" for name, number, alone in _alone(names, range(1, len(names) + 1))]


def _alone(names: Sequence[str], others: Iterable[T]) -> list[tuple[str, T, bool]]:
    """With whether a name occurs once; some disks do not tell a from A."""
    uses = Counter(map(str.casefold, names))
    return [(name, other, uses[name.casefold()] == 1) for name, other in zip(names, others, strict=True)]
