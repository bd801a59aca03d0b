"""What was found in a folder, in a few lines, and the keys that would change it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from dyndet.data.datamodule import DetectionDataModule, Subset
from dyndet.data.dataset import DetectionDataset
from dyndet.data.layouts.found import listed
from dyndet.data.records import FileDataset, Record
from dyndet.data.transforms import Compose, Resize, ResizeShortestEdge

_MOST_CLASSES = 12


def describe(data: DetectionDataModule) -> str:
    """About six lines on the data of a folder, set up for fitting: what it is, what of it is used, and by which keys
    to change that. Empty for data of another kind.
    """
    folder = data.folder
    if folder is None:
        return ""
    train, val, found = _records(data.train), _records(data.val), folder.found
    root = folder.root or ""
    share = folder.share
    validation = f"validation: {_count(val)}"
    if share is not None:
        validation += f", held out of the training images, always the same ones (data.val_share={share:g})"
    elif "val" in found.places:
        validation += f" of {found.places['val']}"
    lines = [
        f"data: {found.layout} {f'in {root}' if root else ''}".rstrip(),
        f"classes ({len(data.categories)}): {_classes(data, train)}",
        f"training: {_count(train)}{_place(found.places, folder.train_split)}",
        validation,
        f"input: {_input(data)}; data.size=640 (short edge) or data.size=[H,W] changes it",
    ]
    notes = list(dict.fromkeys(found.notes))
    others = [name for name in found.splits if name not in (folder.train_split, folder.val_split, folder.pooled)]
    if others:
        notes.append(f"{listed(others)} is left alone (data.val_split={others[0]} evaluates on it)")
    if notes:
        lines.append(f"note: {'; '.join(notes)}")
    if found.choice:
        lines.append(f"to choose otherwise: {found.choice}")
    return "\n".join(f"  {line}" if number else line for number, line in enumerate(lines))


def _records(dataset: DetectionDataset) -> Sequence[Record]:
    if isinstance(dataset, Subset):
        records = _records(dataset.dataset)
        return [records[index] for index in dataset.indices] if records else []
    return dataset.records if isinstance(dataset, FileDataset) else []


def _count(records: Sequence[Record]) -> str:
    boxes = sum(int((~record.crowd).sum()) for record in records)
    empty = sum(record.is_empty for record in records)
    return f"{len(records)} images, {boxes} boxes" + (f" ({empty} images without any)" if empty else "")


def _place(places: dict[str, str], split: str) -> str:
    return f" of {places[split]}" if split in places else ""


def _classes(data: DetectionDataModule, records: Sequence[Record]) -> str:
    counts = Counter[int]()
    for record in records:
        counts.update(record.labels[~record.crowd].tolist())
    names = [f"{category.name} {counts[label]}" for label, category in enumerate(data.categories)]
    missing = [category.name for label, category in enumerate(data.categories) if not counts[label]]
    lost = f"; never in training: {listed(missing)}" if missing and len(names) > _MOST_CLASSES else ""
    return listed(names, _MOST_CLASSES) + lost


def _input(data: DetectionDataModule) -> str:
    train, val = _size(data.train_transform), _size(data.val_transform)
    return train if train == val else f"training {train}, validation {val}"


def _size(transform: Any) -> str:
    for part in transform.transforms if isinstance(transform, Compose) else [transform]:
        if isinstance(part, Resize):
            return f"{part.size[0]} x {part.size[1]} (H x W)"
        if isinstance(part, ResizeShortestEdge):
            short = part.short[0] if len(part.short) == 1 else f"{min(part.short)} to {max(part.short)}"
            return f"short edge {short}, long edge at most {part.max_size}"
    return "as augmented" if transform is not None else "as it is"
