"""`data=auto data.root=FOLDER`: a folder as training and validation set, whatever its layout."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from dyndet.data.layouts.coco_layout import lacks, recognise_coco
from dyndet.data.layouts.found import ALL, SPLIT_WORDS, Found, Wanted, listed
from dyndet.data.layouts.holdout import held_out
from dyndet.data.layouts.tree import Tree
from dyndet.data.layouts.voc_layout import recognise_voc
from dyndet.data.layouts.yolo_layout import recognise_yolo
from dyndet.data.quarantine import OnError
from dyndet.data.records import FileDataset, Repairs
from dyndet.data.user_paths import user_path
from dyndet.errors import DataError, MissingDataError, UserError

logger = logging.getLogger(__name__)

_TRAINING = ("train", "trainval")
_RECOGNISERS = {"coco": recognise_coco, "yolo": recognise_yolo, "voc": recognise_voc}


class DataFolder:
    """A data set in a folder: recognises its format, layout, classes and splits when they are asked for.

    Names are looked at, image files are not; of the annotations only what a split needs is read, and once. Where there
    is no validation split, a fixed share of the training images validates, see `holdout`.

    Args:
        root: the folder; a yaml (YOLO) or json (COCO) file stands for its own folder. `~` is the home folder.
        format: "coco", "yolo" or "voc"; "auto" finds out.
        config: the yaml of a YOLO set, where it is not found or lies elsewhere.
        train_annotations: the COCO json of the training set, where it is not found.
        train_images: the folder of its images.
        val_annotations: the same for validation.
        val_images: the same for validation.
        train_split: which split trains.
        val_split: which split validates; "all" is every image of a folder with one split or none.
        val_share: of the training images, where there is no validation split.
        classes: names to keep, in label order (COCO and VOC); None keeps all.
        on_error: "skip" leaves out images that cannot be used, or whose labels cannot.
        tolerant: reads images whose last bytes are missing, too.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        format: Literal["auto", "coco", "yolo", "voc"] = "auto",
        config: str | Path | None = None,
        train_annotations: str | Path | None = None,
        train_images: str | Path | None = None,
        val_annotations: str | Path | None = None,
        val_images: str | Path | None = None,
        train_split: str = "train",
        val_split: str = "val",
        val_share: float = 0.2,
        classes: Sequence[str] | None = None,
        on_error: OnError = "raise",
        tolerant: bool = False,
    ) -> None:
        self._options: dict[str, Any] = {"on_error": on_error, "tolerant": tolerant}
        self.format = format
        self.train_split = SPLIT_WORDS.get(train_split, train_split)
        self.val_split = SPLIT_WORDS.get(val_split, val_split)
        self.val_share = val_share
        folder, yaml, train = _path(root), _path(config), _path(train_annotations)
        if folder is not None and folder.is_file():
            if folder.suffix.lower() in (".yaml", ".yml", ".data") and yaml is None:
                folder, yaml = None, folder
            elif folder.suffix.lower() == ".json" and train is None:
                folder, train = folder.parent, folder
        self.root = folder
        annotations = {"train": train, "val": _path(val_annotations)}
        images = {"train": _path(train_images), "val": _path(val_images)}
        self._wanted = Wanted(
            config=yaml,
            annotations={split: self._below(file) for split, file in annotations.items() if file is not None},
            images={split: self._below(file) for split, file in images.items() if file is not None},
            classes=[classes] if isinstance(classes, str) else None if classes is None else list(classes),
            rooted=folder is not None,
        )
        self._pool: FileDataset | None = None
        self._held: list[int] = []
        self._files: dict[str, set[Path]] = {}

    @cached_property
    def found(self) -> Found:
        """What the folder is.

        Raises:
            DataError: if it is nothing that is known, or does not exist.
            UserError: if it is two things at once.
        """
        wanted = self._wanted
        tree = self._tree()
        formats = [self.format] if self.format != "auto" else self._formats()
        found = [item for name in formats if (item := _RECOGNISERS[name](tree, wanted)) is not None]
        if len(found) > 1:
            kinds = " and ".join(item.layout for item in found)
            keys = " or ".join(f"data.format={item.format}" for item in found)
            raise UserError(f"{self.root} holds {kinds}: choose one by {keys} (or data={found[0].format})")
        if not found:
            raise MissingDataError(self._nothing(tree))
        if wanted.classes is not None and found[0].format == "yolo":
            raise UserError("data.classes chooses classes of COCO and VOC sets: YOLO's are those of its yaml")
        return found[0]

    def read(self, part: Literal["train", "val"], *, load_masks: bool = False, skip_empty: bool = False) -> FileDataset:
        """The training or the validation set.

        Args:
            part: which.
            load_masks: whether targets carry (N, H, W) masks.
            skip_empty: leaves out images without a box that trains.

        Raises:
            DataError: if the annotations cannot be used.
            UserError: if there is no such split.
        """
        if self.share is not None:
            return self._side(validates=part == "val", load_masks=load_masks, skip_empty=skip_empty)
        name = self.used(part)
        if name not in self.found.splits:
            has = listed(list(self.found.splits)) or "none"
            raise UserError(
                f"{self.root or self._wanted.config} has no split {name!r}: it has {has}; set data.{part}_split to one "
                "of them"
            )
        dataset = self.found.splits[name](load_masks=load_masks, skip_empty=skip_empty, **self._options)
        self._files[part] = {record.path for record in dataset.records}
        self._tell_the_same()
        return dataset

    def used(self, part: Literal["train", "val"]) -> str:
        """The split that a part is read from, if it is there: of a folder without splits, or without "train", the
        rest trains; "trainval" is all that trains where nothing validates.
        """
        name, splits = self.train_split if part == "train" else self.val_split, self.found.splits
        if name in splits:
            return name
        if name == ALL and len(splits) == 1:
            return next(iter(splits))
        if name == "trainval" and "train" in splits and "val" not in splits:
            return "train"
        return ALL if ALL in splits and (part == "train" or name == "trainval") and name in _TRAINING else name

    @property
    def share(self) -> float | None:
        """The share of the training images that validates; None where there is a validation split."""
        splits = self.found.splits
        own = self.val_split == "val" and "val" not in splits and self.used("train") in splits
        return self.val_share if own else None

    def _tell_the_same(self) -> None:
        """They may be meant, to see whether anything is learned at all; but that has to be known."""
        train, val = self._files.get("train"), self._files.get("val")
        if not train or not val or 2 * len(train & val) <= len(val):
            return
        said = f"{len(train & val)} of {len(val)} validation images are training images"
        logger.warning("%s in %s: AP tells how well they are learnt by heart", said, self.root or "the data")

    def _side(self, *, validates: bool, load_masks: bool, skip_empty: bool) -> FileDataset:
        """One side of the split that is made here; both come from one reading."""
        if self._pool is None or (load_masks and not self._pool.load_masks):
            self._pool = self.found.splits[self.used("train")](load_masks=load_masks, skip_empty=False, **self._options)
            every = self._pool.records
            if self._wanted.classes is not None:  # which are kept does not change who validates
                found = _RECOGNISERS[self.found.format](self._tree(), replace(self._wanted, classes=None))
                reader = None if found is None else found.splits[self.used("train")]
                every = every if reader is None else reader(skip_empty=False, **self._options).records
            classes = [record.labels[~record.crowd].tolist() for record in every]
            self._held = held_out([self._name(record.path) for record in every], classes, self.val_share)
        held = set(self._held)
        chosen = [record for i, record in enumerate(self._pool.records) if (i in held) == validates]
        part = copy.copy(self._pool)
        part.records = [record for record in chosen if not (skip_empty and record.is_empty)]
        part.sizes = [record.size for record in part.records]
        part.repairs = Repairs.of(chosen)
        part.load_masks = load_masks
        if not part.records:
            raise DataError(f"{self.root} has no images with boxes to train on: set data.skip_empty=false")
        return part

    def _name(self, image: Path) -> str:
        """From the root on: the same wherever the set lies."""
        root = self.root or (self._wanted.config or next(iter(self._wanted.annotations.values()))).parent
        root = root.absolute()
        return image.relative_to(root).as_posix() if image.is_relative_to(root) else image.name

    def _tree(self) -> Tree | None:
        """What lies in the folder, where that has to be known."""
        wanted, root = self._wanted, self.root
        named = next(iter(wanted.annotations.values()), None)
        if wanted.annotations.keys() == wanted.images.keys() == {"train", "val"}:
            return None
        if named is not None and (root is None or not root.is_dir()):  # coco.yaml's root stands for what is not named
            root = named.parent
        if root is None and wanted.config is None:
            key = "data.root=FOLDER or data.config=FILE.yaml" if self.format == "yolo" else "data.root=FOLDER"
            raise UserError(f"no data was named: add {key} to the command")
        return None if root is None else Tree.of(root.absolute())

    def _formats(self) -> list[str]:
        if self._wanted.config is not None:
            return ["yolo"]
        return ["coco"] if self._wanted.annotations else list(_RECOGNISERS)

    def _below(self, path: Path) -> Path:
        """As given, else from the root on."""
        return self.root / path if not path.exists() and self.root is not None and (self.root / path).exists() else path

    def _nothing(self, tree: Tree | None) -> str:
        wanted = {
            "coco": "a COCO json (annotations/*.json, train/_annotations.coco.json, ...)",
            "yolo": "a data.yaml, or images with YOLO texts of the same names",
            "voc": "VOC xml of the same names as images",
        }
        looked = wanted[self.format] if self.format in wanted else "; ".join(wanted.values())
        if tree is None:
            return f"data.format={self.format} takes a folder: set data.root"
        images = sum(len(listing.images) for listing in tree.with_images())
        kinds = {suffix: len(tree.files(suffix)) for suffix in (".json", ".xml", ".txt", ".yaml", ".zip")}
        has = ", ".join([f"{images} images", *(f"{count} {suffix}" for suffix, count in kinds.items() if count)])
        place = f"{has} in {len(tree.folders)} folders"
        lacking = "; ".join(text for file in tree.files(".json")[:3] if (text := lacks(file)))
        why = f"{lacking}. Give" if lacking else "unpack the .zip, or give" if kinds[".zip"] and not images else "give"
        return f"{tree.root} holds no annotations that were recognised ({place}): {why} {looked}"


def read_part(
    folder: DataFolder, *, part: Literal["train", "val"] = "train", load_masks: bool = False, skip_empty: bool = False
) -> FileDataset:
    """`DataFolder.read` as a part of a configuration: the data module hands the folder over."""
    return folder.read(part, load_masks=load_masks, skip_empty=skip_empty)


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else user_path(value)
