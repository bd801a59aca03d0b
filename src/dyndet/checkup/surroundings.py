"""Checks of the folders around a data set: files that nobody uses, label files without an image."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from dyndet.checkup.finding import Finding, Place, first_few, many
from dyndet.checkup.split import Split
from dyndet.data.images import SUFFIXES, UNREAD, image_size
from dyndet.errors import DataError

MOST_FAULTS = 50
"""Of labels that are shown: all must be mended before anything else can be checked."""

_TWINS = {"images": ("labels",), "JPEGImages": ("Annotations",)}
_LABELS = (".txt", ".xml")
_NO_LABELS = frozenset({"classes", "obj", "readme", "license", "notes", "train", "val", "valid", "test"})


def check_folders(splits: Sequence[Split]) -> list[Finding]:
    """Looks into the folders that images were read from, and into those where their labels would lie."""
    files = [path for split in splits for path in split.files]
    used = {path.absolute() for path in files}
    folders = {path.parent for path in used}
    findings = []
    unused = [path for folder in sorted(folders) for path in _images(folder) if path not in used]
    if unused:
        findings.append(
            Finding(
                "images in no split",
                "note",
                f"{many(len(unused), 'image')} beside those of the splits that no split lists",
                len(unused),
                "fine if they are set apart; otherwise their labels are missing",
                first_few([Place("", None, str(path)) for path in unused]),
            )
        )
    others = [path for folder in sorted(folders) for path in _listed(folder) if path.suffix.lower() in UNREAD]
    if others:
        findings.append(
            Finding(
                "images that are not read",
                "warning",
                f"{many(len(others), 'image')} of formats that are not read",
                len(others),
                "convert them to JPEG: they are left out",
                first_few([Place("", None, str(path)) for path in others]),
            )
        )
    lonely = [path for folder in sorted(folders) for path in _lonely(folder)]
    if lonely:
        findings.append(
            Finding(
                "labels without an image",
                "warning",
                f"{many(len(lonely), 'label file')} without an image",
                len(lonely),
                "the image was renamed, moved or never copied",
                first_few([Place("", None, str(path)) for path in lonely]),
            )
        )
    return findings


def unusable(error: DataError) -> Finding:
    """What kept a data set from being read, fault by fault."""
    advice = "mend this first: the other checks need it"
    if not error.faults:
        return Finding("labels", "error", str(error), 1, advice)
    places = tuple(Place("", None, fault) for fault in error.faults[:MOST_FAULTS])
    count = len(error.faults)
    shown = f", of which {MOST_FAULTS} are shown" if count > MOST_FAULTS else ""
    return Finding("labels", "error", f"the data cannot be used: {count} faults{shown}", count, advice, places)


def unreadable_files(root: Path, most: int = 20_000) -> list[Finding]:
    """Images below a folder that cannot be opened: where the labels cannot be read, these may be why.

    Args:
        root: the folder of a data set.
        most: files that are looked at.
    """
    images = (path for folder, _, names in os.walk(root) for path in (Path(folder, name) for name in sorted(names)))
    bad: list[Place] = []
    for path in islice((path for path in images if path.suffix.lower() in SUFFIXES and path.name[0] != "."), most):
        try:
            image_size(path)
        except DataError as error:
            bad.append(Place("", None, str(error)))
    if not bad:
        return []
    text = f"{many(len(bad), 'image file')} below {root} that cannot be opened"
    return [Finding("unreadable images", "error", text, len(bad), "replace or remove them", first_few(bad))]


def missing_files(splits: Sequence[Split]) -> list[Finding]:
    """Images that are listed but are not there."""
    gone = [
        split.at_image(index)
        for split in splits
        for index, path in enumerate(split.paths)
        if path and not Path(path).is_file()
    ]
    if not gone:
        return []
    text = f"{many(len(gone), 'image')} named by labels, but not there"
    return [Finding("missing images", "error", text, len(gone), "check the image folder", first_few(gone))]


def _images(folder: Path) -> Iterator[Path]:
    return (path for path in _listed(folder) if path.suffix.lower() in SUFFIXES and path.name[0] != ".")


def _listed(folder: Path) -> list[Path]:
    """What lies in a folder, which labels may name without its being there."""
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _lonely(folder: Path) -> Iterator[Path]:
    """Label files for a folder of images whose image is not there."""
    stems = {path.stem for path in _images(folder)}
    for place in [folder, *_label_folders(folder)]:
        labels = (path for path in _listed(place) if path.suffix in _LABELS and path.name[0] != ".")
        yield from (path for path in labels if path.stem not in stems and path.stem.lower() not in _NO_LABELS)


def _label_folders(folder: Path) -> Iterator[Path]:
    """Where the labels of images/train, say, lie: labels/train."""
    parts = list(folder.parts)
    for place in range(len(parts) - 1, -1, -1):
        for twin in _TWINS.get(parts[place], ()):
            found = Path(*parts[:place], twin, *parts[place + 1 :])
            if found.is_dir():
                yield found
                return
