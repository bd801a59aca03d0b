"""VOC xml in any arrangement: with or without ImageSets, in folders of their own or of splits, beside the images."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path, PurePosixPath

from dyndet.data.layouts.found import ALL, Found, Wanted, listed, split_of, split_word
from dyndet.data.layouts.tree import Listing, Tree
from dyndet.data.records import FileDataset
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
    folder = FoundFolder(tree, folders)
    sets = [listing for listing in tree.folders.values() if listing.path.parts[-2:] == ("ImageSets", "Main")]
    if len(sets) == 1 and (lists := _lists(sets[0])):
        folder.lists = lists
        layout = f"VOC ({tree.short(folders[0].path)} with {tree.short(sets[0].path)})"
    else:
        layout = f"VOC xml ({listed([tree.short(listing.path) for listing in folders], 3)})"
        by_split: dict[str, list[Path]] = {}
        for listing in folders:
            files = [listing.path / name for name in listing.others[".xml"]]
            by_split.setdefault(split_of(listing.path, tree.root) or ALL, []).extend(files)
        folder.splits = by_split
    found = Found("voc", layout, {}, choice="data.train_split, data.val_split, data.classes=[...]")
    if folder.lists:
        _without_splits_of_its_own(folder)
        found.places = {split: tree.short(file) for split, file in folder.lists.items()}
    elif ALL in folder.splits and "train" in folder.splits:
        left = folder.splits.pop(ALL)
        folder.files = [file for file in folder.files if file not in set(left)]
        found.notes.append(f"not used: {listed([tree.short(file) for file in left], 2)}")
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


def _read(
    folder: FoundFolder, split: str, wanted: Wanted, *, load_masks: bool = False, skip_empty: bool = False
) -> FileDataset:
    if load_masks:
        raise UserError("VOC xml holds boxes, not masks: set data.masks=false")
    return VocDataset(folder, split=split, classes=wanted.classes, skip_empty=skip_empty)


class FoundFolder(VocFolder):
    """VOC xml wherever they were found.

    Args:
        tree: names in the folder.
        folders: those that hold xml.

    Attributes:
        lists: text files of stems by split.
        splits: annotations by split, where folders say it.
        notes: where images were found.
    """

    def __init__(self, tree: Tree, folders: list[Listing]) -> None:
        self.root = tree.root
        self.files = [listing.path / name for listing in folders for name in listing.others[".xml"]]
        self.lists: dict[str, Path] = {}
        self.splits: dict[str, list[Path]] = {}
        self.images = {listing.path: _folders_of_images(listing, tree) for listing in folders}
        apart = {
            tree.short(images[0].path) for path, images in self.images.items() if images and images[0].path != path
        }
        self.notes = [f"images in {listed(sorted(apart), 3)}"] if apart else []

    def members(self, split: str) -> tuple[str | Path, list[Path]]:
        if split in self.splits:
            return f"{self.root} ({split})", self.splits[split]
        listing = self.lists[split]
        by_stem = {file.stem: file for file in self.files}
        try:
            stems = [line.strip() for line in listing.read_text("utf-8-sig").splitlines() if line.strip()]
        except ValueError as error:
            raise DataError(f"{listing} is not a text file ({error}): it lists one file name per line") from error
        named = [stem if stem in by_stem else PurePosixPath(stem.replace("\\", "/")).stem for stem in stems]
        for stem, written in zip(named, stems, strict=True):
            if stem not in by_stem:
                raise DataError(f"{listing} names {written!r}, but there is no such xml: add it or remove the line")
        if len(set(named)) < len(named):
            twice = next(stem for stem in named if named.count(stem) > 1)
            raise DataError(f"{listing} names {twice!r} twice: remove one")
        return listing, [by_stem[stem] for stem in named]

    def image(self, file: Path, filename: str) -> Path:
        """The image of the xml's stem; of several that which it names; else what it names."""
        name = PurePosixPath(filename.replace("\\", "/")).name
        for listing in self.images[file.parent]:
            if listing.has(name) and os.path.splitext(name)[0] == file.stem:  # noqa: PTH122
                return listing.image(name)
            if file.stem in listing.stems:
                return listing.image(listing.stems[file.stem])
        for listing in self.images[file.parent]:
            if listing.has(name):
                return listing.image(name)
        raise DataError(
            f"{file} has no image: neither {file.stem}.jpg (or .png, ...) nor {name!r} lies in {self.root}: add it or "
            "remove the xml"
        )


def _folders_of_images(listing: Listing, tree: Tree) -> list[Listing]:
    """Where the images of a folder of xml may be: the folder that has most of them first, else the nearest."""
    stems = {name[:-4] for name in listing.others[".xml"]}

    def order(other: Listing) -> tuple[int, bool, int, str]:
        shared = len(os.path.commonpath([other.path, listing.path]))
        return -len(stems & other.stems.keys()), other.path != listing.path, -shared, str(other.path)

    return sorted(tree.with_images(), key=order)


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


def _lists(folder: Listing) -> dict[str, Path]:
    """Lists of a split each; of VOC's lists per class (`cat_train.txt`) none."""
    names = {name[:-4]: folder.path / name for name in folder.others.get(".txt", [])}
    words = {stem: split_word(stem) for stem in names}
    own = {stem for stem in names if words[stem] is None or stem.lower().isalpha()}
    return {words[stem] or stem: names[stem] for stem in sorted(own)}
