"""Files of predictions, written as they come: whatever interrupts, what was written before can be read."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dyndet.data.masks import encode_mask
from dyndet.data.sources import Source
from dyndet.metrics.export import to_coco_json
from dyndet.structures import Category, Detections, Size


@dataclass(frozen=True)
class Prediction:
    """What was found in one image, or in one frame of a video.

    Attributes:
        file: its path.
        name: of files about it, see `Source.name`.
        number: from 0, of all images and frames.
        size: (H, W) in pixels.
        found: in these pixels, on the CPU.
        gmacs: billions of multiply-adds spent on it.
        way: "route" and "difficulty", of a dynamic detector.
        frame: "frame" and "seconds", of a video.
        picture: where it is drawn, if it is.
    """

    file: str
    name: str
    number: int
    size: Size
    found: Detections
    gmacs: float
    way: dict[str, Any] = field(default_factory=dict)
    frame: dict[str, Any] = field(default_factory=dict)
    picture: str | None = None


class Writer(Protocol):
    """One format; built with the folder, the categories, and what there is to read."""

    file: Path

    def write(self, prediction: Prediction) -> None: ...

    def failed(self, file: str, why: str) -> None:
        """A file that could not be read."""
        ...

    def close(self) -> None: ...


class JsonArray:
    """A json array on disk that is whole after every `append`."""

    def __init__(self, path: str | Path) -> None:
        self._file = Path(path).open("wb", buffering=0)  # noqa: SIM115 - open for long
        self._end = self._file.write(b"[")
        self._file.write(b"]\n")
        self._before = b"\n"

    def append(self, item: Any) -> None:
        text = self._before + json.dumps(item).encode()
        self._file.seek(self._end)
        self._file.write(text + b"\n]\n")  # at once, over the old end
        self._end += len(text)
        self._before = b",\n"

    def close(self) -> None:
        self._file.close()


class JsonWriter:
    """`detections.json`: an entry per image, with boxes xyxy in its pixels; of files that could not be read, why."""

    def __init__(self, folder: Path, categories: Sequence[Category], sources: Sequence[Source] = ()) -> None:
        self.file = folder / "detections.json"
        self._categories = categories
        self._array = JsonArray(self.file)

    def write(self, prediction: Prediction) -> None:
        item = prediction
        entry = {"file": item.file} | item.frame | ({"picture": item.picture} if item.picture else {})
        entry |= {"size": item.size, "gmacs": item.gmacs, "detections": _rows(item.found, self._categories)}
        self._array.append(entry | item.way)

    def failed(self, file: str, why: str) -> None:
        self._array.append({"file": file, "error": why})

    def close(self) -> None:
        self._array.close()


class CocoWriter:
    """`coco_results.json`: COCO's list of results, boxes xywh, with the file of each beside its `image_id`.

    Ids are those of COCO's file names, where every file is called by another whole number (`000000000139.jpg` is 139);
    else images count from 1, in the order of `detections.json`.
    """

    def __init__(self, folder: Path, categories: Sequence[Category], sources: Sequence[Source] = ()) -> None:
        self.file = folder / "coco_results.json"
        self._categories = categories
        stems = [Path(source.path).stem for source in sources if source.kind == "image"]
        numbers = {int(stem) for stem in stems if stem.isdecimal()}
        self._named = bool(sources) and len(numbers) == len(sources)
        self._array = JsonArray(self.file)

    def write(self, prediction: Prediction) -> None:
        image_id = int(Path(prediction.file).stem) if self._named else prediction.number + 1
        for entry in to_coco_json([prediction.found], [image_id], self._categories):
            self._array.append(entry | {"file_name": prediction.file} | prediction.frame)

    def failed(self, file: str, why: str) -> None: ...

    def close(self) -> None:
        self._array.close()


class YoloWriter:
    """`labels/NAME.txt` per image, empty when nothing was found: class, centre, size (as shares of the image), score.

    `classes.txt` names the classes, a line each.
    """

    def __init__(self, folder: Path, categories: Sequence[Category], sources: Sequence[Source] = ()) -> None:
        self.file = folder / "labels"
        self.file.mkdir(parents=True, exist_ok=True)
        names = "".join(f"{category.name}\n" for category in categories)
        (folder / "classes.txt").write_text(names, encoding="utf-8")

    def write(self, prediction: Prediction) -> None:
        found, (height, width) = prediction.found, prediction.size
        scale = found.boxes.new_tensor([width, height])
        centres = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2 / scale
        sides = (found.boxes[:, 2:] - found.boxes[:, :2]) / scale
        columns = (found.labels.tolist(), centres.tolist(), sides.tolist(), found.scores.tolist())
        lines = [
            f"{label} {x:.6f} {y:.6f} {w:.6f} {h:.6f} {score:.6f}\n"
            for label, (x, y), (w, h), score in zip(*columns, strict=True)
        ]
        number = f"_{prediction.frame['frame']:06d}" if prediction.frame else ""
        file = self.file / f"{prediction.name}{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(lines), encoding="utf-8")

    def failed(self, file: str, why: str) -> None: ...

    def close(self) -> None: ...


class CsvWriter:
    """`detections.csv`: a line per object, corners in pixels; `frame` is empty for images."""

    COLUMNS = ("file", "frame", "category_id", "category", "score", "x1", "y1", "x2", "y2", "width", "height", "gmacs")

    def __init__(self, folder: Path, categories: Sequence[Category], sources: Sequence[Source] = ()) -> None:
        self.file = folder / "detections.csv"
        self._categories = categories
        self._file = self.file.open("w", encoding="utf-8", newline="")
        self._table = csv.writer(self._file)
        self._table.writerow((*self.COLUMNS, "route"))

    def write(self, prediction: Prediction) -> None:
        height, width = prediction.size
        for row in _rows(prediction.found, self._categories):
            what = (row["category_id"], row["category"], row["score"], *row["box_xyxy"])
            where = (prediction.file, prediction.frame.get("frame", ""))
            self._table.writerow((*where, *what, width, height, prediction.gmacs, prediction.way.get("route", "")))
        self._file.flush()

    def failed(self, file: str, why: str) -> None: ...

    def close(self) -> None:
        self._file.close()


def _rows(found: Detections, categories: Sequence[Category]) -> list[dict[str, Any]]:
    """One dict per detection, with the original category id and the mask, if any, as COCO run lengths."""
    rows: list[dict[str, Any]] = [
        {"category_id": categories[label].id, "category": categories[label].name, "score": score, "box_xyxy": box}
        for box, score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    ]
    if found.masks is not None:
        for row, mask in zip(rows, found.masks, strict=True):
            row["segmentation"] = encode_mask(mask)
    return rows
