"""What lies in a folder: names only, no file is opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from dyndet.data.images import SUFFIXES, resolve_inside
from dyndet.errors import DataError, MissingDataError

MOST_FOLDERS = 20_000
DEPTH = 8


@dataclass(frozen=True)
class Listing:
    """Names in one folder, sorted; those of hidden files are left out.

    Attributes:
        path: the folder.
        images: files that are images by their suffix.
        others: other files by suffix in lower case (".json").
        links: those of the images that are symbolic links.
    """

    path: Path
    images: list[str]
    others: dict[str, list[str]]
    links: frozenset[str] = frozenset()

    @cached_property
    def stems(self) -> dict[str, str]:
        """Images by stem: of several the first."""
        return {os.path.splitext(name)[0]: name for name in reversed(self.images)}  # noqa: PTH122 - many names

    def image(self, name: str) -> Path:
        """The path of one of the images.

        Raises:
            DataError: if it is a link that leads out of the folder.
        """
        return resolve_inside(self.path, name) if name in self.links else self.path / name

    def has(self, name: str) -> bool:
        return name in self._names

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.images)


@dataclass(frozen=True)
class Tree:
    """A folder and those below it, nearest first.

    Links to other folders are followed, also to another disk, but not to what lies in the tree itself.
    """

    root: Path
    folders: dict[Path, Listing] = field(repr=False)

    @classmethod
    def of(cls, root: Path, depth: int = DEPTH) -> Tree:
        """Lists a folder.

        Raises:
                DataError: if it does not exist, or is no data set but half a disk.
        """
        if not root.is_dir():
            raise MissingDataError(f"{root} {'is no folder' if root.exists() else 'does not exist'}: check the path")
        home, level, found = os.path.realpath(root), [root], {}
        linked: set[str] = set()
        for _ in range(depth + 1):
            below: list[Path] = []
            for folder in level:
                found[folder] = _listing(folder, home, linked, below)
                if len(found) > MOST_FOLDERS:
                    raise DataError(f"{root} holds more than {MOST_FOLDERS} folders: name the data set's own folder")
            level = sorted(below)
        return cls(root, found)

    def files(self, *suffixes: str) -> list[Path]:
        """Files of these kinds, nearest first."""
        return [
            listing.path / name
            for listing in self.folders.values()
            for suffix in suffixes
            for name in listing.others.get(suffix, [])
        ]

    def with_images(self) -> Iterator[Listing]:
        return (listing for listing in self.folders.values() if listing.images)

    def listing(self, folder: Path) -> Listing | None:
        return self.folders.get(folder)

    def short(self, path: Path) -> str:
        """A path for people: from the root on, with a slash after folders."""
        if not path.is_relative_to(self.root):
            return str(path)
        text = path.relative_to(self.root).as_posix()
        return "the folder itself" if text == "." else f"{text}/" if path in self.folders else text


def _listing(folder: Path, home: str, linked: set[str], below: list[Path]) -> Listing:
    images: list[str] = []
    links: list[str] = []
    others: dict[str, list[str]] = {}
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:  # lost+found, say; a root that cannot be read shows as an empty one
        return Listing(folder, [], {})
    for entry in entries:
        name = entry.name
        if name[0] == "." or name == "__MACOSX":
            continue
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link to itself
            continue
        if is_folder:
            if entry.is_symlink():
                real = os.path.realpath(entry.path)
                if f"{real}/".startswith(f"{home}/") or f"{home}/".startswith(f"{real}/") or real in linked:
                    continue  # listed where it lies, or a circle
                linked.add(real)
            below.append(folder / name)
            continue
        if not is_file and not (entry.is_symlink() and not os.path.exists(entry.path)):  # noqa: PTH110
            continue  # a device or a pipe, which would be read without end; a link to nothing shows when it is read
        suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 - many names
        if suffix in SUFFIXES:
            images.append(name)
            if entry.is_symlink():
                links.append(name)
        else:
            others.setdefault(suffix, []).append(name)
    return Listing(folder, images, others, frozenset(links))
