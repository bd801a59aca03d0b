"""COCO json as COCO, Roboflow, CVAT, Label Studio and people lay it out: which files, and where their images lie."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from dyndet.data.coco import CocoDataset, load_coco
from dyndet.data.images import find_inside
from dyndet.data.layouts.found import ALL, Found, Wanted, listed, other_split, split_of, split_word
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
    places = {split: tree.short(file) if tree is not None else str(file) for split, file in files.items()}
    found_splits = Found(
        "coco",
        f"COCO json ({', '.join(places.values())})",
        {},
        places,
        choice="data.train_annotations=FILE.json data.train_images=FOLDER (and val_)",
    )
    for split, file in files.items():
        found_splits.splits[split] = partial(_read, file, split, tree, wanted, found_splits.notes)
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


def lacks(file: Path) -> str:
    """What a json that is nearly one of COCO does not have; empty where it is none, or lacks nothing."""
    missing = [key.decode() for key in _KEYS if key not in _keys(file)]
    return f"{file.name} lacks {' and '.join(missing)}" if 0 < len(missing) < len(_KEYS) else ""


def _is_coco(file: Path) -> bool:
    return len(_keys(file)) == len(_KEYS)


def _keys(file: Path) -> list[bytes]:
    """Which of COCO's keys occur, without parsing: usually the first bytes say so."""
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return [key for key in _KEYS if content.find(key) >= 0]
    except (OSError, ValueError):  # empty, say
        return []


def _read(file: Path, split: str, tree: Tree | None, wanted: Wanted, notes: list[str], **options: Any) -> FileDataset:
    content = load_coco(file)
    folder = wanted.images.get(split) or (wanted.images.get("train") if split == ALL else None)
    if folder is None:
        folder = _placed(content, file, split, tree, notes)
    return CocoDataset(file, folder, classes=wanted.classes, content=content, **options)


def _placed(content: dict[str, Any], file: Path, split: str, tree: Tree | None, notes: list[str]) -> Path:
    """The folder of the images; file names in `content` become those below it."""
    root = file.parent if tree is None else tree.root
    entries = [entry for entry in content["images"] if isinstance(entry.get("file_name"), str)]
    if not entries:
        raise DataError(f"{file} lists no images with a file_name: see cocodataset.org/#format-data")
    names = [str(entry["file_name"]) for entry in entries]
    folder, dropped, absent = _locate(names, list(_candidates(file, split, tree)), file, root)
    if _too_many(absent, min(len(names), _SAMPLE)):
        inside = tree is not None and folder.is_relative_to(root)
        found = _spread(names, split, tree) if tree is not None and inside else {}
        found |= {
            name: (folder.relative_to(root) / short).as_posix() if inside else short
            for name in names
            if _exists(folder, short := _shortened(name, dropped))
        }
        lost = [name for name in names if name not in found]
        if not inside or _too_many(len(lost), len(names)):
            raise MissingDataError(
                f"{file}: {len(lost)} of its {len(names)} images are missing, e.g. {(lost or names)[0]!r}, though "
                f"others lie in {folder}: put them there, or give data=coco data.train_images=FOLDER (data.val_images)",
                tuple(f"{folder / name} does not exist" for name in lost),
            )
        notes.append(f"images of {split}: in several folders")
        for entry, name in zip(entries, names, strict=True):
            entry["file_name"] = found.get(name, name)
        return root
    notes.append(f"images of {split}: {folder if tree is None else tree.short(folder)}")
    if dropped:
        notes.append(f"{file.name}: {dropped} leading folder(s) of its file names left out")
        for entry, name in zip(entries, names, strict=True):
            entry["file_name"] = _shortened(name, dropped)
    if absent:
        count = min(_SAMPLE, len(names))
        notes.append(f"{file.name}: {absent} of {count} file names looked up do not exist")
    return folder


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
    found = dict.fromkeys(folder for folder in [*usual, *folders, *above] if folder.is_dir())
    yield from (folder for folder in found if not other_split(folder, split, root))


def _locate(names: Sequence[str], folders: Sequence[Path], file: Path, root: Path) -> tuple[Path, int, int]:
    """Where images exist: the folder, how many leading folders of the names to drop, how many of a sample are not
    there. The least dropped at which a folder has half of them counts, a usual folder first.
    """
    sample = [names[index * len(names) // min(len(names), _SAMPLE)] for index in range(min(len(names), _SAMPLE))]
    deepest = max(len(_parts(name)) for name in sample) - 1
    known = len(set(names))
    best: tuple[int, Path, int] = (0, root, 0)
    for dropped in range(min(deepest, _MOST_DROPPED) + 1):
        if dropped and len({_shortened(name, dropped) for name in names}) < known:
            break  # two images would be one file
        for folder in folders:
            hits = sum(_exists(folder, _shortened(name, dropped)) for name in sample)
            if not _too_many(len(sample) - hits, len(sample)):
                return folder, dropped, len(sample) - hits
            best = max(best, (hits, folder, dropped), key=lambda item: item[0])
        if 2 * best[0] >= len(sample):
            break
    if not best[0]:
        raise MissingDataError(
            f"{file} names images such as {sample[0]!r}, which lie in no folder of {root}: put them there, or give "
            "data=coco data.train_images=FOLDER (data.val_images)"
        )
    return best[1], best[2], len(sample) - best[0]


def _too_many(absent: int, count: int) -> bool:
    return absent > max(1, count // 20)


def _spread(names: Sequence[str], split: str, tree: Tree) -> dict[str, str]:
    """Where each image lies below the root, if that is one place; the more of its folders are the same the better."""
    places: dict[str, list[Path]] = {}
    for listing in tree.with_images():
        if not other_split(listing.path, split, tree.root):
            for name in listing.images:
                places.setdefault(name, []).append(listing.path)
    found: dict[str, str] = {}
    for name in names:
        *above, last = _parts(name) or [""]
        here = places.get(last, [])
        for first in range(len(above) + 1):
            end = tuple(above[first:])
            fitting = [folder for folder in here if folder.parts[len(folder.parts) - len(end) :] == end]
            if fitting:
                if len(fitting) == 1:
                    found[name] = (fitting[0] / last).relative_to(tree.root).as_posix()
                break
    return found if len(set(found.values())) == len(found) else {}


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
