"""COCO json as COCO, Roboflow, CVAT, Label Studio and people lay it out: which files, and where their images lie."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from dyndet.data.coco import CocoDataset, load_coco
from dyndet.data.images import find_inside
from dyndet.data.layouts.found import ALL, Found, Wanted, listed, split_of, split_word
from dyndet.data.layouts.tree import Tree
from dyndet.data.records import FileDataset
from dyndet.errors import DataError, MissingDataError, UserError

_OTHER_TASKS = re.compile(r"captions|keypoints|panoptic|stuff|image_info|unlabeled")
_KEYS = (b'"images"', b'"annotations"', b'"categories"')
_SAMPLE = 60
_MOST_DROPPED = 6


def recognise_coco(tree: Tree | None, wanted: Wanted) -> Found | None:
    """COCO jsons of a folder: by their names and keys, nothing is parsed yet.

    Args:
        tree: the folder; None where every file is given.
        wanted: files and folders set by hand go before those found.

    Raises:
        UserError: if several files could be one split.
    """
    files: dict[str, Path] = dict(wanted.annotations)
    found, left = _splits([] if tree is None or {"train", "val"} <= set(files) else tree.files(".json"), tree)
    if files and ALL in found and ALL not in files:  # what was named is the training set, or a part of it
        left += found.pop(ALL)
    for split, candidates in found.items():
        if split not in files:
            files[split] = _one(candidates, split, tree)
    if not files:
        return None
    root = tree.root if tree is not None else None
    places = {split: tree.short(file) if tree is not None else str(file) for split, file in files.items()}
    found_splits = Found(
        "coco",
        f"COCO json ({', '.join(places.values())})",
        {},
        places,
        choice="data.train_annotations=FILE.json data.train_images=FOLDER (and val_)",
    )
    for split, file in files.items():
        found_splits.splits[split] = partial(_read, file, split, tree, wanted, found_splits.notes, root)
    ignored = [tree.short(file) for file in left] if tree is not None else []
    if ignored:
        found_splits.notes.append(f"not used: {listed(ignored)}")
    return found_splits


def _splits(jsons: list[Path], tree: Tree | None) -> tuple[dict[str, list[Path]], list[Path]]:
    """Candidates by split, and those that are none beside them."""
    found: dict[str, list[Path]] = {}
    for file in jsons:
        if _is_coco(file):
            split = split_word(file.stem) or (split_of(file.parent, tree.root) if tree is not None else None) or ALL
            found.setdefault(split, []).append(file)
    if not found:
        return {}, []
    for split, files in found.items():
        found[split] = [file for file in files if not _OTHER_TASKS.search(file.name)] or files
    if ALL in found and "train" in found:
        return found, found.pop(ALL)
    return found, []


def _one(candidates: list[Path], split: str, tree: Tree | None) -> Path:
    best = [file for file in candidates if file.name.startswith("instances")] or candidates
    if len(best) > 1:
        names = listed([tree.short(file) if tree is not None else str(file) for file in best])
        key = "val_annotations" if split == "val" else "train_annotations"
        what = "this set" if split == ALL else f"the {split} split"
        raise UserError(f"{len(best)} json files could be {what}: {names}; choose one by data=coco data.{key}=FILE")
    return best[0]


def _is_coco(file: Path) -> bool:
    """Whether its keys occur, without parsing it: usually the first bytes say so."""
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return all(content.find(key) >= 0 for key in _KEYS)
    except (OSError, ValueError):  # empty, say
        return False


def _read(
    file: Path, split: str, tree: Tree | None, wanted: Wanted, notes: list[str], root: Path | None, **options: Any
) -> FileDataset:
    content = load_coco(file)
    given = wanted.images.get(split) or (wanted.images.get("train") if split == ALL else None)
    if given is None:
        folder, dropped, absent = _locate(content, _candidates(file, split, tree), file, root or file.parent)
        where = tree.short(folder) if tree is not None else str(folder)
        notes.append(f"images of {split}: {where}")
        if dropped:
            notes.append(f"{file.name}: {dropped} leading folder(s) of its file names left out")
        if absent:
            notes.append(
                f"{file.name}: {absent} of {min(_SAMPLE, len(content['images']))} file names looked up do not exist"
            )
        for entry in content["images"]:
            if isinstance(name := entry.get("file_name"), str):
                entry["file_name"] = _shortened(name, dropped)
    else:
        folder = given
    return CocoDataset(file, folder, classes=wanted.classes, content=content, **options)


def _candidates(file: Path, split: str, tree: Tree | None) -> Iterator[Path]:
    """Folders that the file names may start from, the usual ones first."""
    root = tree.root if tree is not None else file.parent
    stem = file.stem.removeprefix("instances_")
    usual = [
        root / stem,
        file.parent,
        root / "images",
        root / "images" / stem,
        root / split,
        root / split / "images",
        root / "images" / split,
        file.parent / "images",
        root,
    ]
    folders = [] if tree is None else [listing.path for listing in tree.with_images()]
    folders.sort(key=lambda folder: split_of(folder, root) != split)  # stable: of its own split first
    above = [parent for folder in folders for parent in folder.parents if parent.is_relative_to(root)]
    yield from dict.fromkeys(folder for folder in [*usual, *folders, *above] if folder.is_dir())


def _locate(content: dict[str, Any], folders: Iterator[Path], file: Path, root: Path) -> tuple[Path, int, int]:
    """Where images exist: the folder, how many leading folders of the names to drop, how many are not there."""
    names = [entry["file_name"] for entry in content["images"] if isinstance(entry.get("file_name"), str)]
    if not names:
        raise DataError(f"{file} lists no images with a file_name: see cocodataset.org/#format-data")
    sample = [names[index * len(names) // min(len(names), _SAMPLE)] for index in range(min(len(names), _SAMPLE))]
    places = list(folders)
    deepest = max(len(_parts(name)) for name in sample) - 1
    best: tuple[int, Path, int] = (0, root, 0)
    for dropped in range(min(deepest, _MOST_DROPPED) + 1):
        for folder in places:
            hits = sum(_exists(folder, _shortened(name, dropped)) for name in sample)
            if hits == len(sample):
                return folder, dropped, 0
            best = max(best, (hits, folder, dropped), key=lambda item: item[0])
    if not best[0]:
        raise MissingDataError(
            f"{file} names images such as {sample[0]!r}, which lie in no folder of {root}: put them there, or give "
            "data=coco data.train_images=FOLDER (data.val_images)"
        )
    return best[1], best[2], len(sample) - best[0]


def _parts(name: str) -> list[str]:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return [part for part in parts if part not in ("/", ".", "..") and not part.endswith(":")]


def _shortened(name: str, dropped: int) -> str:
    """A file name without its first folders."""
    parts = _parts(name) if dropped else []
    return "/".join(parts[min(dropped, len(parts) - 1) :]) if parts else name


def _exists(folder: Path, name: str) -> bool:
    try:
        return find_inside(folder, name).is_file()
    except (DataError, OSError):
        return False
