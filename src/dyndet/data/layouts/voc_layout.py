"""VOC xml in any arrangement: with or without ImageSets, in folders of their own or of splits, beside the images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any

from dyndet.data.images import SUFFIXES
from dyndet.data.layouts.found import ALL, Found, Wanted, by_split, listed, split_word
from dyndet.data.layouts.tree import Listing, Tree
from dyndet.data.layouts.voc_images import VocImages
from dyndet.data.records import FileDataset
from dyndet.data.text_files import read_text
from dyndet.data.voc import VocDataset, VocFolder
from dyndet.errors import DataError, UserError

_HEAD = 4096


def recognise_voc(tree: Tree | None, wanted: Wanted) -> Found | None:
    """Folders of VOC xml and, where there are any, lists of images in ImageSets/Main."""
    if tree is None:
        return None
    folders = [listing for listing in tree.folders.values() if _is_voc(listing)]
    if not folders:
        return None
    folder = FoundFolder(tree, folders, list(wanted.images.values()))
    sets = [listing for listing in tree.folders.values() if listing.path.parts[-2:] == ("ImageSets", "Main")]
    folder.lists = _lists(sets)
    found = Found("voc", "", {}, choice="data.train_split, data.val_split, data.classes=[...]")
    where = listed([tree.short(listing.path) for listing in folders], 3)
    if folder.lists:
        _without_splits_of_its_own(folder)
        found.layout = f"VOC ({where} with {listed([tree.short(listing.path) for listing in sets], 3)})"
        found.places = {split: listed(list(map(tree.short, files)), 3) for split, files in folder.lists.items()}
    else:
        found.layout = f"VOC xml ({where})"
        folder.splits, left = by_split(folder.files, lambda file: file.parent, tree.root)
        if left:
            gone = set(left)
            folder.files = [file for file in folder.files if file not in gone]
            found.notes.append(f"not used: {listed(list(map(tree.short, left)), 2)}")
    for split in folder.lists or folder.splits:
        found.splits[split] = partial(_read, folder, split, wanted)
        found.places.setdefault(
            split, listed(sorted({tree.short(file.parent) for file in folder.splits.get(split, [])}))
        )
    found.notes += folder.notes
    return found


def _without_splits_of_its_own(folder: FoundFolder) -> None:
    """VOC2007's test package has trainval and test alone; CVAT lists everything as `default`."""
    if "train" not in folder.lists and "trainval" in folder.lists:
        folder.lists["train"] = folder.lists.pop("trainval")
    if "train" not in folder.lists and len(folder.lists) == 1 and "val" not in folder.lists:
        name = next(iter(folder.lists))
        if name != "test":
            folder.lists[ALL] = folder.lists.pop(name)


def _read(folder: FoundFolder, split: str, wanted: Wanted, *, load_masks: bool = False, **options: Any) -> FileDataset:
    if load_masks:
        raise UserError("VOC xml holds boxes, not masks: set data.masks=false")
    return VocDataset(folder, split=split, classes=wanted.classes, **options)


class FoundFolder(VocFolder):
    """VOC xml wherever they were found.

    Args:
        tree: names in the folder.
        folders: those that hold xml.
        images: folders of images that the user named.

    Attributes:
        lists: text files of names by split; of several sets below one folder each has one.
        splits: annotations by split, where folders say it.
        notes: where images were found.
    """

    def __init__(self, tree: Tree, folders: list[Listing], images: Sequence[Path] = ()) -> None:
        self.root = tree.root
        self.files = [listing.path / name for listing in folders for name in listing.others[".xml"]]
        self.lists: dict[str, list[Path]] = {}
        self.splits: dict[str, list[Path]] = {}
        self.images = VocImages(tree, folders, images)
        apart = self.images.apart()
        self.notes = [f"images in {listed(apart, 3)}"] if apart else []

    def members(self, split: str) -> tuple[str | Path, list[Path]]:
        if split in self.splits:
            return f"{self.root} ({split})", self.splits[split]
        files: dict[Path, Path] = {}
        for listing in self.lists[split]:
            try:
                lines = [line.strip() for line in read_text(listing).splitlines() if line.strip()]
            except ValueError as error:
                raise DataError(f"{listing} is not a text file ({error}): it lists one file name per line") from error
            for line in lines:
                file = self._listed(line, listing)
                if file in files:
                    raise DataError(f"{listing} names {line!r} twice: remove one")
                files[file] = listing
        return listed(self.lists[split], 3), list(files)

    def image(self, file: Path, filename: str) -> Path:
        return self.images.of(file, filename)

    def _listed(self, line: str, listing: Path) -> Path:
        """The xml of a line, which may name folders, too."""
        parts = _parts(line)
        for first in range(len(parts)):
            files = self._by_end.get(parts[first:], [])
            if len(files) > 1:  # sets beside one another
                files = [file for file in files if file.is_relative_to(listing.parents[2])] or files
            if len(files) > 1:
                raise DataError(
                    f"{listing} names {line!r}, which could be {files[0]} or {files[1]}: write its folder, too"
                )
            if files:
                return files[0]
        raise DataError(f"{listing} names {line!r}, but there is no such xml: add it or remove the line")

    @cached_property
    def _by_end(self) -> dict[tuple[str, ...], list[Path]]:
        """Annotations by the ends of their paths, without suffix."""
        found: dict[tuple[str, ...], list[Path]] = {}
        for file in self.files:
            parts = file.relative_to(self.root).with_suffix("").parts
            for first in range(len(parts)):
                found.setdefault(parts[first:], []).append(file)
        return found


def _is_voc(listing: Listing) -> bool:
    """Whether one of the first xml files is an annotation."""
    for name in listing.others.get(".xml", [])[:5]:
        try:
            with (listing.path / name).open("rb") as stream:
                if b"<annotation" in stream.read(_HEAD):
                    return True
        except OSError:
            continue
    return False


def _lists(folders: list[Listing]) -> dict[str, list[Path]]:
    """Lists of a split each; of VOC's lists per class (`cat_train.txt`) none."""
    found: dict[str, list[Path]] = {}
    for folder in folders:
        names = {name[:-4]: folder.path / name for name in folder.others.get(".txt", [])}
        words = {stem: split_word(stem) for stem in names}
        for stem in sorted(stem for stem in names if stem.isalpha() or not (words[stem] or stem.endswith("_trainval"))):
            found.setdefault(words[stem] or stem, []).append(names[stem])
    return found


def _parts(line: str) -> tuple[str, ...]:
    path = PurePosixPath(line.replace("\\", "/"))
    known = path.suffix.lower() in SUFFIXES or path.suffix.lower() == ".xml"
    return tuple(part for part in (path.with_suffix("") if known else path).parts if part not in ("/", ".", ".."))
