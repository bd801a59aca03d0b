"""What a YOLO set says of itself: class names, and where the images of each split lie."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from dyndet.data.images import SUFFIXES, resolve_inside
from dyndet.data.layouts.tree import Listing, Tree
from dyndet.errors import DataError, MissingDataError
from dyndet.structures import Category

SYNONYMS = {"val": ("val", "valid", "validation"), "train": ("train",), "test": ("test",)}


@dataclass
class YoloConfig:
    """Classes and splits of a set, from its yaml, darknet's .data file, or what was found without any.

    Attributes:
        source: the file or folder, for messages.
        categories: label k is `categories[k]`.
        entries: by split: folders of images, text files listing images, or image files.
        bases: folders that entries start from; the first where an entry exists counts.
        notes: what was taken otherwise than written.
    """

    source: Path
    categories: list[Category]
    entries: Mapping[str, Sequence[str | Path]]
    bases: list[Path]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, file: str | Path, root: str | Path | None = None) -> YoloConfig:
        """Reads a yaml or a darknet .data file.

        Args:
            file: with `names` or `nc` and the splits; what it names is declared by its owner and may lie anywhere.
            root: folder that the splits start from, before the file's own `path` and folder.

        Raises:
            DataError: if it cannot be read or has no classes.
        """
        file = Path(file).expanduser()
        content = _load(file)
        notes: list[str] = []
        home = file.parent.absolute()
        bases = [] if root is None else [Path(root).expanduser().absolute()]
        if path := content.get("path"):
            declared = home / Path(str(path)).expanduser()
            if declared.is_dir():
                bases.append(declared)
            elif not bases:
                notes.append(f"path {path} of {file.name} does not exist: its own folder is taken")
        return cls(
            file, _categories(content, file, home), _entries(content), list(dict.fromkeys([*bases, home])), notes
        )

    def has(self, split: str) -> bool:
        return bool(self.entries.get(split))

    def splits(self) -> list[str]:
        """Names of the splits, whether they exist or not; keys of other names count where files lie behind them."""
        return [split for split in self.entries if split in SYNONYMS or self.exists(split)]

    def exists(self, split: str) -> bool:
        """Whether all that a split names is there."""
        return self.has(split) and all(self._find(entry) is not None for entry in self.entries[split])

    def images(self, split: str) -> list[Path]:
        """Image files of a split, sorted.

        Raises:
            DataError: if there is no such split, it names what does not exist or holds no image, or a list leads out
                of the bases.
        """
        if not self.has(split):
            found = ", ".join(self.splits()) or "none"
            raise DataError(f"{self.source} has no split {split!r}: choose one of those it has ({found})")
        images: list[Path] = []
        for entry in self.entries[split]:
            place = self._find(entry)
            if place is None:
                raise MissingDataError(
                    f"{self.source}: {split} names {self.bases[0] / entry}, which does not exist: correct it, or set "
                    "data.root to the folder that holds the data"
                )
            if place.is_dir():
                found = [listing.image(name) for listing in Tree.of(place).with_images() for name in listing.images]
                if not found:
                    raise DataError(f"{self.source}: split {split!r} names {place}, which has no images: correct it")
                images += found
            else:
                images += [place] if place.suffix.lower() in SUFFIXES else self._listed(place)
        if not images:
            raise DataError(f"split {split!r} of {self.source} has no images")
        return sorted(set(images))

    def _find(self, entry: str | Path) -> Path | None:
        """Where an entry lies: as written, else by its last folders (made on another machine, or a `../` too many)."""
        text = str(entry)
        if isinstance(entry, Path):
            return entry
        for base in self.bases:
            if (place := base / Path(text.replace("\\", "/")).expanduser()).exists():
                return _straight(place)
        parts = _parts(text)
        for place in (base.joinpath(*parts[first:]) for first in range(len(parts)) for base in self.bases):
            if place.exists():
                self._note(f"{text} of {self.source.name} is {place}")
                return place
        return None

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _listed(self, listing: Path) -> list[Path]:
        """Images of a text file; names start from its folder or a base, and stay there."""
        try:
            lines = [line.strip() for line in listing.read_text("utf-8-sig").splitlines()]
        except ValueError as error:
            raise DataError(f"{listing} is not a text file ({error}): it lists one image per line") from error
        odd = next((i for i, line in enumerate(lines, 1) if line and Path(line).suffix.lower() not in SUFFIXES), None)
        if odd:
            raise DataError(f"{listing} line {odd} names no image: it lists one image file per line")
        bases = list(dict.fromkeys([listing.parent, *self.bases]))
        places: dict[str, Listing | None] = {}
        return [self._line(line, listing, bases, places) for line in lines if line]

    def _line(self, line: str, listing: Path, bases: list[Path], places: dict[str, Listing | None]) -> Path:
        """The image that a line names; most lines of a list share their folder, which is looked up once."""
        folder, _, name = line.replace("\\", "/").rpartition("/")
        known = places.get(folder)
        if known is None or not known.has(name):
            known = places[folder] = self._folder_with(folder, name, listing, bases)
        if known is not None:
            return known.image(name)
        try:
            return resolve_inside(listing.parent, line)  # it does not exist, which reading it will say
        except DataError as error:
            hint = "or set data.root to the folder that holds the data"
            raise DataError(f"{listing}: {error}, {hint}") from error

    def _folder_with(self, folder: str, name: str, listing: Path, bases: list[Path]) -> Listing | None:
        parts = _parts(folder)
        written = [base / folder for base in bases]
        for place in [*written, *(base.joinpath(*parts[k:]) for k in range(len(parts) + 1) for base in bases)]:
            if (place / name).is_file() and any(_within(place, base) for base in bases):
                place = _straight(place)
                if place not in written and ".." not in folder and not folder.startswith("."):
                    self._note(f"{folder}/ in {listing.name} is {place}")
                return Tree.of(place, depth=0).folders[place]
        return None


def numbered(count: int) -> list[Category]:
    """Classes without names: by their numbers."""
    return [Category(id, str(id)) for id in range(count)]


def named(names: Sequence[str]) -> list[Category]:
    return [Category(id, name) for id, name in enumerate(names)]


def read_names(file: Path) -> list[str]:
    """Class names of classes.txt, obj.names and their like: one a line.

    Raises:
        DataError: if it is no text file or empty.
    """
    try:
        names = [line.strip() for line in file.read_text("utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as text ({error}): it lists one class name per line") from error
    while names and not names[-1]:
        names.pop()
    if not names:
        raise DataError(f"{file} is empty: it lists one class name per line")
    return names


def _load(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text("utf-8-sig")
        if file.suffix.lower() == ".data":
            return dict(re.findall(r"^\s*(\w+)\s*=\s*(.*?)\s*$", text, re.MULTILINE)) | {"_darknet": True}
        content = yaml.safe_load(text)
    except OSError as error:
        raise MissingDataError(f"{file} cannot be read ({error.strerror}): check the path") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is not valid yaml ({error}): correct it") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} is not a YOLO configuration: it needs names and the splits")
    return content


def _entries(content: dict[str, Any]) -> dict[str, list[str]]:
    found = {}
    for split, keys in SYNONYMS.items():
        value = next((content[key] for key in keys if content.get(key)), None)
        if value:
            found[split] = [str(entry) for entry in value] if isinstance(value, list) else [str(value)]
    known = {key for keys in SYNONYMS.values() for key in keys} | {
        "names",
        "path",
        "nc",
        "backup",
        "_darknet",
        "classes",
    }
    for key, value in content.items():  # splits of other names
        if key not in known and value and isinstance(value, str | list) and key not in found:
            found[str(key)] = [str(entry) for entry in value] if isinstance(value, list) else [str(value)]
    return found


def _categories(content: dict[str, Any], file: Path, home: Path) -> list[Category]:
    names: Any = content.get("names")
    if content.get("_darknet"):
        parts = _parts(str(names or ""))
        places = [home.joinpath(*parts[k:]) for k in range(len(parts))]
        found = next((place for place in places if place.is_file()), None)
        names = None if found is None else read_names(found)
        count: Any = content.get("classes")
        content = {"nc": int(count)} if str(count).isdigit() else {}
    if names is None and isinstance(count := content.get("nc"), int) and 0 < count < 100_000:
        return numbered(count)
    if isinstance(names, list):
        names = dict(enumerate(names))
    if isinstance(names, dict) and all(str(key).isdigit() for key in names):
        names = {int(key): name for key, name in names.items()}
    if not isinstance(names, dict) or not names or not all(isinstance(key, int) for key in names):
        raise DataError(f"{file} has no usable names: give a list, or a mapping from class number to name")
    if content.get("nc", len(names)) != len(names):
        raise DataError(f"{file} has nc {content['nc']} but {len(names)} names: correct one of them")
    return [Category(id, str(names[id])) for id in sorted(names)]


def _parts(text: str) -> list[str]:
    parts = PurePosixPath(text.replace("\\", "/")).parts
    return [part for part in parts if part not in ("/", ".", "..") and not part.endswith(":")]


def _straight(place: Path) -> Path:
    """Without `..`, links as they are: `labels` is looked for beside the last `images` of the path."""
    parts: list[str] = []
    for part in place.absolute().parts:
        if part == ".." and len(parts) > 1:
            parts.pop()
        else:
            parts.append(part)
    straight = Path(*parts)
    return straight if straight.exists() else place


def _within(folder: Path, base: Path) -> bool:
    """By its text, links as they are, or where it really lies."""
    text = Path(os.path.normpath(folder.absolute()))
    return text.is_relative_to(os.path.normpath(base.absolute())) or folder.resolve().is_relative_to(base.resolve())
