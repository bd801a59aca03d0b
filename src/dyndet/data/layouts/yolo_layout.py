"""YOLO sets as their tools leave them: with a yaml, with darknet's files, or with nothing but images and texts."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from dyndet.data.images import SUFFIXES
from dyndet.data.layouts.found import ALL, SPLIT_WORDS, Found, Wanted, by_split, listed, split_of, split_word
from dyndet.data.layouts.tree import Listing, Tree
from dyndet.data.records import FileDataset
from dyndet.data.text_files import read_text
from dyndet.data.yolo import YoloDataset, twins
from dyndet.data.yolo_config import YoloConfig, load_yaml, named, numbered, read_names
from dyndet.errors import UserError
from dyndet.structures import Category

_NAME_FILES = ("classes.txt", "obj.names", "classes.names", "_darknet.labels", "labels.txt", "predefined_classes.txt")
_NO_LABELS = frozenset({"classes", "labels", "notes", "predefined_classes", *SPLIT_WORDS})
_LABEL = re.compile(r"\s*\d+(\.0*)?(\s+[-+.\deE]+){4,}\s*")
_LARGEST = 1_000_000
_SPLIT_LINE = re.compile(rf"^\s*({'|'.join(SPLIT_WORDS)})\s*:", re.MULTILINE)


def recognise_yolo(tree: Tree | None, wanted: Wanted) -> Found | None:
    """A YOLO set: by its yaml, by darknet's .data and lists, or by images that have texts.

    Args:
        tree: the folder; None where the yaml is given and nothing else.
        wanted: the yaml set by hand goes before one found.

    Raises:
        UserError: if several yamls could describe it.
    """
    file = wanted.config or (None if tree is None else _configuration(tree))
    if file is not None:
        # A folder that was named comes first where the yaml was named, too.
        config = YoloConfig.read(file, tree.root if tree is not None and wanted.rooted else None)
        text = tree.short(file) if tree is not None else str(file)
        return _found(config, f"YOLO ({text})")
    if tree is None:
        return None
    return _with_lists(tree) or _without_files(tree)


def _found(config: YoloConfig, layout: str) -> Found:
    found = Found("yolo", layout, {}, choice="data.config=FILE.yaml", notes=config.notes)
    for split in config.splits():
        if not config.exists(split):
            found.notes.append(f"{split}: {listed(list(config.entries[split]))} does not exist and is left out")
            if split != "train":
                continue
        found.splits[split] = partial(_read, config, split)
        found.places[split] = listed([str(entry) for entry in config.entries[split]], 2)
    return found


def _read(config: YoloConfig, split: str, **options: Any) -> FileDataset:
    return YoloDataset(config, split=split, **options)


def _configuration(tree: Tree) -> Path | None:
    """The yaml or .data file that describes the folder."""
    near = [file for file in tree.files(".yaml", ".yml", ".data") if len(file.relative_to(tree.root).parts) <= 3]
    fitting = [file for file in near if _describes(file)]
    depth = min((len(file.parts) for file in fitting), default=0)
    best = [file for file in fitting if len(file.parts) == depth]
    if len(best) > 1:
        names = listed([tree.short(file) for file in best])
        raise UserError(f"{tree.root} holds {len(best)} YOLO files: {names}; choose one by data=yolo data.config=FILE")
    return best[0] if best else None


def _describes(file: Path) -> bool:
    try:
        if file.stat().st_size > _LARGEST:
            return False
        text = read_text(file)
        if file.suffix.lower() == ".data":
            return bool(re.search(r"^\s*train\s*=", text, re.MULTILINE))
    except (OSError, ValueError):
        return False
    try:
        content = load_yaml(text)
    except (ValueError, yaml.YAMLError, RecursionError):  # what is wrong with it is said when it is read
        return bool(re.search(r"^\s*(names|nc)\s*:", text, re.MULTILINE) and _SPLIT_LINE.search(text))
    return isinstance(content, dict) and bool({"names", "nc"} & set(content)) and bool({*SPLIT_WORDS} & set(content))


def _with_lists(tree: Tree) -> Found | None:
    """Darknet without its .data file: train.txt and val.txt that list images."""
    lists: dict[str, Path] = {}
    for name in tree.folders[tree.root].others.get(".txt", []):
        file = tree.root / name
        if (split := split_word(file.stem)) and _lists_images(file):
            lists.setdefault(split, file)
    if "train" not in lists:
        return None
    listings = [listing for listing in tree.with_images() if _texts(listing, tree)]
    categories, notes = _names(tree, listings)
    entries = {split: [file.name] for split, file in lists.items()}
    config = YoloConfig(tree.root, categories, entries, [tree.root], notes)
    return _found(config, f"YOLO (lists of images: {listed([file.name for file in lists.values()])})")


def _lists_images(file: Path) -> bool:
    try:
        with file.open(encoding="utf-8-sig") as stream:
            first = next((line.strip() for line in stream if line.strip()), "")
    except (OSError, ValueError):
        return False
    return Path(first).suffix.lower() in SUFFIXES


def _without_files(tree: Tree) -> Found | None:
    """Images with a text of the same name, beside them or in `labels`."""
    labelled = [listing for listing in tree.with_images() if _texts(listing, tree)]
    if not labelled:
        return None
    categories, notes = _names(tree, labelled)
    parts, left = by_split(labelled, lambda listing: listing.path, tree.root)
    if left:
        notes.append(f"not used: {listed([tree.short(listing.path) for listing in left])}")
    for listing in tree.with_images():  # of the same place without any text: they count as negatives
        split = split_of(listing.path, tree.root) or ALL
        if split in parts and listing not in parts[split] and _beside(listing, parts[split]):
            parts[split].append(listing)
    entries = {split: [item.image(name) for item in part for name in item.images] for split, part in parts.items()}
    config = YoloConfig(tree.root, categories, entries, [tree.root], notes)
    where = [tree.short(part[0].path) for part in parts.values()]
    found = Found("yolo", f"YOLO without a yaml (images in {listed(where)})", {}, notes=config.notes)
    for split, part in parts.items():
        found.splits[split] = partial(_read, config, split)
        found.places[split] = listed([tree.short(listing.path) for listing in part], 2)
    return found


def _beside(listing: Listing, others: list[Listing]) -> bool:
    """Whether a folder of images belongs to others: `images/b` beside `images/a`."""
    return any(listing.path.parent == other.path.parent and "images" in listing.path.parts for other in others)


def _texts(listing: Listing, tree: Tree) -> list[Path]:
    """Label files of a folder of images, if the first of them is one."""
    for folder in [*twins(listing.path, [tree.root]), listing.path]:
        twin = tree.listing(folder)
        names = [] if twin is None else [name for name in twin.others.get(".txt", []) if name[:-4] in listing.stems]
        names = [name for name in names if folder != tree.root or name[:-4] not in _NO_LABELS]
        files = [folder / name for name in names]
        if files and any(_is_label(file) for file in files[:100]):
            return files
    return []


def _is_label(file: Path) -> bool:
    """Whether the first line is a class and a box; an empty file says nothing."""
    try:
        with file.open(encoding="utf-8-sig") as stream:
            first = next((line for line in stream if line.strip()), "")
    except (OSError, ValueError):
        return False
    return bool(_LABEL.fullmatch(first[:100_000]))


def _names(tree: Tree, labelled: list[Listing]) -> tuple[list[Category], list[str]]:
    """Classes of a set without a yaml: of a file of names, else numbers as far as labels go."""
    found = [
        (file, read_names(file))
        for listing in sorted(tree.folders.values(), key=lambda listing: len(listing.path.parts))
        for name in _NAME_FILES
        if name in listing.others.get(Path(name).suffix, []) and not _is_label(file := listing.path / name)
    ]
    if found:  # LabelImg writes one into each folder, as far as its classes were used there
        alike = [(file, names) for file, names in found if file.name == found[0][0].name]
        file, names = max(alike, key=lambda item: len(item[1]))
        other = next((other for other, some in alike if some != names[: len(some)]), None)
        if other is not None:
            raise UserError(
                f"{tree.short(file)} and {tree.short(other)} of {tree.root} order classes differently: make them equal "
                "or describe the set in a data.yaml"
            )
        return named(names), [f"class names: {tree.short(file)}"]
    highest = 0
    for file in (file for listing in labelled for file in _texts(listing, tree)):
        try:
            lines = read_text(file).splitlines()
        except (OSError, ValueError):
            continue  # reading the set will say so
        highest = max([highest, *(int(float(line.split()[0])) for line in lines if _LABEL.fullmatch(line))])
    return numbered(highest + 1), ["classes have numbers for names: write one name per line into classes.txt"]
