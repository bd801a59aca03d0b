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
from dyndet.data.layouts.found import SPLIT_WORDS, split_word
from dyndet.data.layouts.tree import Listing, Tree
from dyndet.data.text_files import read_text
from dyndet.data.user_paths import lies_there, user_path
from dyndet.errors import DataError, MissingDataError
from dyndet.structures import Category

_NO_SPLITS = frozenset(
    {"names", "path", "nc", "backup", "classes", "_darknet", "download", "kpt_shape", "flip_idx", "roboflow"}
)


class _Loader(yaml.SafeLoader):
    """Texts stay texts: `no` is a class, not false."""


_Loader.yaml_implicit_resolvers = {
    first: [item for item in found if item[0] in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_yaml(text: str) -> object:
    """Mappings, lists, texts and None.

    Raises:
        yaml.YAMLError: if it is none.
    """
    return yaml.load(text, _Loader)


@dataclass
class YoloConfig:
    """Classes and splits of a set, from its yaml, darknet's .data file, or what was found without any.

    Attributes:
        source: the file or folder, for messages.
        categories: label k is `categories[k]`.
        entries: by split: folders of images, text files listing images, or image files.
        bases: folders that entries start from; the first where an entry exists counts.
        notes: what was taken otherwise than written.
        keypoints: numbers that follow each box, of a set for poses.
    """

    source: Path
    categories: list[Category]
    entries: Mapping[str, Sequence[str | Path]]
    bases: list[Path]
    notes: list[str] = field(default_factory=list)
    keypoints: int = 0

    @classmethod
    def read(cls, file: str | Path, root: str | Path | None = None) -> YoloConfig:
        """Reads a yaml or a darknet .data file.

        Args:
            file: with `names` or `nc` and the splits; what it names is declared by its owner and may lie anywhere.
            root: folder that the splits start from, before the file's own `path` and folder.

        Raises:
            DataError: if it cannot be read or has no classes.
        """
        file = user_path(file)
        content = _load(file)
        notes: list[str] = []
        home = file.parent.absolute()
        bases = [] if root is None else [user_path(root).absolute()]
        if path := content.get("path"):
            declared = _joined(home, str(path))
            if declared is not None and declared.is_dir():
                bases.append(declared)
            elif not bases:
                notes.append(f"path {path} of {file.name} does not exist: its own folder is taken")
        return cls(
            file,
            _categories(content, file, home),
            _entries(content),
            list(dict.fromkeys([*bases, home])),
            notes,
            _keypoints(content, file),
        )

    def has(self, split: str) -> bool:
        return bool(self.entries.get(split))

    def splits(self) -> list[str]:
        """Names of the splits, whether they exist or not; keys of other names count where files lie behind them."""
        return [split for split in self.entries if split in SPLIT_WORDS or self.exists(split)]

    def exists(self, split: str) -> bool:
        """Whether anything that a split names is there; reading it will say what is not."""
        return self.has(split) and any(self._find(entry) is not None for entry in self.entries[split])

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
        """Where an entry lies: as written, but rather inside of a base than beside it by a `../` too many; else by its
        last folders (made on another machine), those that name a split among them.
        """
        if isinstance(entry, Path):
            return entry
        parts = _parts(entry)
        straight = [place for base in self.bases if ".." in entry and (place := _joined(base, *parts))]
        written = [place for base in self.bases if (place := _joined(base, entry.replace("\\", "/")))]
        inside = [place for place in written if any(_within(place, base) for base in self.bases)]
        for place in [*straight, *inside, *(place for place in written if place not in inside)]:
            place = _straight(place)
            if place not in map(_straight, written):
                self._note(f"{entry} of {self.source.name} is {place}")
            elif not any(_within(place, base) for base in self.bases):
                self._note(f"{entry} of {self.source.name} lies outside of {self.bases[0]}: {place}")
            return place
        for place in (
            _joined(base, *parts[first:]) for first in _droppable(parts)[: len(parts)] for base in self.bases
        ):
            if place is not None:
                self._note(f"{entry} of {self.source.name} is {place}")
                return place
        return None

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _listed(self, listing: Path) -> list[Path]:
        """Images of a text file; names start from its folder or a base, and stay there."""
        try:
            lines = [line.strip() for line in read_text(listing).splitlines()]
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
        ends = [parts[first:] for first in _droppable(parts)]
        for place in [*written, *(base.joinpath(*end) for end in ends for base in bases)]:
            if lies_there(place / name) and any(_within(place, base) for base in bases):
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
        names = [line.strip() for line in read_text(file).splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as text ({error}): it lists one class name per line") from error
    while names and not names[-1]:
        names.pop()
    if not names:
        raise DataError(f"{file} is empty: it lists one class name per line")
    return names


def _load(file: Path) -> dict[str, Any]:
    try:
        text = read_text(file)
        if file.suffix.lower() == ".data":
            return dict(re.findall(r"^\s*(\w+)\s*=\s*(.*?)\s*$", text, re.MULTILINE)) | {"_darknet": True}
        content = load_yaml(text)
    except OSError as error:
        raise MissingDataError(f"{file} cannot be read ({error.strerror}): check the path") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is not valid yaml ({_fault(error)}): correct it") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} is not a YOLO configuration: it needs names and the splits")
    return content


def _fault(error: Exception) -> str:
    """What is wrong with a yaml, and where, in one line."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    backslash = "; write \\ as / in paths" if "escape" in str(error.problem) else ""
    return f"line {error.problem_mark.line + 1}: {error.problem}{backslash}"


def _entries(content: dict[str, Any]) -> dict[str, list[str]]:
    """What each split names: train, val and test by any of their words, then keys of other names."""
    found: dict[str, list[str]] = {}
    for key in [*SPLIT_WORDS, *(key for key in content if key not in SPLIT_WORDS and key not in _NO_SPLITS)]:
        value = content.get(key)
        entries = [str(entry) for entry in value] if isinstance(value, list) else [value]
        if value and all(isinstance(entry, str) and "\n" not in entry for entry in entries):
            found.setdefault(SPLIT_WORDS.get(key, str(key)), [str(entry) for entry in entries])
    return found


def _keypoints(content: dict[str, Any], file: Path) -> int:
    shape = content.get("kpt_shape")
    if shape is None:
        return 0
    if not isinstance(shape, list) or len(shape) != 2 or not all(str(number).isdigit() for number in shape):
        raise DataError(f"{file} has kpt_shape {shape!r}: give [points, numbers of each]")
    return int(shape[0]) * int(shape[1])


def _categories(content: dict[str, Any], file: Path, home: Path) -> list[Category]:
    names: Any = content.get("names")
    if content.get("_darknet"):
        parts = _parts(str(names or ""))
        places = [home.joinpath(*parts[k:]) for k in range(len(parts))]
        found = next((place for place in places if place.is_file()), None)
        names = None if found is None else read_names(found)
        content = {"nc": content.get("classes")}
    count: Any = content.get("nc")
    if names is None and str(count).isdigit() and 0 < int(count) < 100_000:
        return numbered(int(count))
    if isinstance(names, list):
        names = dict(enumerate(names))
    if isinstance(names, dict) and all(str(key).isdigit() for key in names):
        names = {int(key): name for key, name in names.items()}
    if not isinstance(names, dict) or not names or not all(isinstance(key, int) for key in names):
        raise DataError(f"{file} has no usable names: give a list, or a mapping from class number to name")
    if count is not None and str(count).strip() != str(len(names)):
        raise DataError(f"{file} has nc {count} but {len(names)} names: correct one of them")
    return [Category(id, str(names[id])) for id in sorted(names)]


def _parts(text: str) -> list[str]:
    parts = PurePosixPath(text.replace("\\", "/")).parts
    return [part for part in parts if part not in ("/", ".", "..") and not part.endswith(":")]


def _droppable(parts: Sequence[str]) -> range:
    """How many first folders of a path may differ on this machine: not the one that names the split."""
    named = [k for k, part in enumerate(parts) if split_word(part)]
    return range(named[-1] + 1 if named else len(parts) + 1)


def _joined(base: Path, *parts: str) -> Path | None:
    """A path below a folder, or where it leads itself; None where nothing lies."""
    try:
        place = base.joinpath(Path(*parts).expanduser())
        return place if place.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a character that no path has, a user that is none
        return None


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
