"""Broken COCO jsons."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dyndet.data.coco import CocoDataset
from faults.annotation_cases import SECOND, SIZE, Case

GONE = object()
Content = dict[str, Any]


def content() -> Content:
    """A sound one."""
    boxes = [[10, 10, 20, 10], [40, 10, 10, 20], [5, 5, 20, 20], [5, 5, 20, 20]]
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": SIZE[0], "width": SIZE[1]} for i in (1, 2, 3)],
        "annotations": [
            {"id": i, "image_id": max(i - 1, 1), "category_id": 1 + i % 2, "bbox": box, "area": box[2] * box[3]}
            | {"iscrowd": 0}
            for i, box in enumerate(boxes, start=1)
        ],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }


def read(case: Case, folder: Path) -> CocoDataset:
    changed = case.change(content())
    file = folder / "a.json"
    if isinstance(changed, bytes):
        file.write_bytes(changed)
    else:
        file.write_text(json.dumps(changed))
    return CocoDataset(file, folder / "images")


def put(kind: str, key: str, value: object, place: int = 0) -> Callable[[Content], Content]:
    """Sets, or takes away, a key of an entry."""

    def change(found: Content) -> Content:
        entry = found[kind][place]
        if value is GONE:
            del entry[key]
        else:
            entry[key] = value
        return found

    return change


def _whole(key: str, value: object) -> Callable[[Content], Content]:
    def change(found: Content) -> Content:
        if value is GONE:
            del found[key]
            return found
        return found | {key: value}

    return change


def _every(kind: str, key: str, make: Callable[[Any], object]) -> Callable[[Content], Content]:
    def change(found: Content) -> Content:
        for entry in found[kind]:
            entry[key] = make(entry[key])
        return found

    return change


def _bytes(make: Callable[[bytes], bytes]) -> Callable[[Content], bytes]:
    return lambda found: make(json.dumps(found).encode())


def _box(value: object) -> Callable[[Content], Content]:
    return put("annotations", "bbox", value)


NAN, INF = float("nan"), float("inf")
ONLY = [SECOND]
CASES = [
    *(Case(f"no {key}", _whole(key, GONE), f'no list of objects "{key}"') for key in content()),
    *(Case(f"{key} is null", _whole(key, None), f'no list of objects "{key}"') for key in content()),
    *(Case(f"{key} is an object", _whole(key, {}), f'no list of objects "{key}"') for key in content()),
    *(Case(f"{key} holds numbers", _whole(key, [1, 2]), f'no list of objects "{key}"') for key in content()),
    Case("images are none", _whole("images", []), "not in the list of images"),
    Case("annotations are none", _whole("annotations", []), "none of the 3 images"),
    Case("categories are none", _whole("categories", []), "which is not in the list of categories"),
    Case("all are none", lambda found: {key: [] for key in found}, "has no images"),
    Case("a list", lambda found: [found], "no list of objects"),
    Case("a number", lambda found: 3, "no list of objects"),
    Case("null", lambda found: None, "no list of objects"),
    Case("no byte", _bytes(lambda data: b""), "not valid json"),
    Case("cut in half", _bytes(lambda data: data[: len(data) // 2]), "not valid json"),
    Case("csv", _bytes(lambda data: b"image,xmin,ymin,xmax,ymax\n1.jpg,1,2,3,4\n"), "not valid json"),
    Case("json lines", _bytes(lambda data: data + b"\n" + data), "not valid json"),
    Case("a comma too many", _bytes(lambda data: data[:-1] + b",}"), "not valid json"),
    Case("quotes of Python", _bytes(lambda data: data.replace(b'"', b"'")), "not valid json"),
    Case("no utf-8", _bytes(lambda data: data.replace(b'"a"', b'"\xff\xfe"')), "not valid json"),
    Case("zero bytes", _bytes(lambda data: b"\0" * 100), "not valid json"),
    Case("nested deep", _bytes(lambda data: b"[" * 100_000), "not valid json"),
    Case("byte order mark", _bytes(lambda data: b"\xef\xbb\xbf" + data)),
    Case("utf-16", _bytes(lambda data: data.decode().encode("utf-16"))),
    Case("CRLF", lambda found: json.dumps(found, indent=1).replace("\n", "\r\n").encode()),
    Case("NaN in a box", _box([NAN, 10, 20, 10]), boxes=ONLY, repairs={"non-finite": 1}),
    Case("inf in a box", _box([10, 10, INF, 10]), boxes=ONLY, repairs={"non-finite": 1}),
    Case("-inf in a box", _box([-INF, 10, 20, 10]), boxes=ONLY, repairs={"non-finite": 1}),
    Case("1e400 in a box", _bytes(lambda data: data.replace(b"[10, 10, 20, 10]", b"[1e400, 10, 20, 10]", 1)),
         boxes=ONLY, repairs={"non-finite": 1}),
    Case("an integer of 400 digits", _box([10**400, 10, 20, 10]), boxes=ONLY, repairs={"non-finite": 1}),
    Case("1e300 in a box", _box([1e300, 10, 20, 10]), boxes=ONLY, repairs={"non-finite": 1}),
    Case("negative width", _box([30, 10, -20, 10]), boxes=ONLY, repairs={"inverted": 1}),
    Case("negative height", _box([10, 20, 20, -10]), boxes=ONLY, repairs={"inverted": 1}),
    Case("no width", _box([10, 10, 0, 10]), boxes=ONLY, repairs={"zero-size": 1}),
    Case("no height", _box([10, 10, 20, 0]), boxes=ONLY, repairs={"zero-size": 1}),
    Case("a tiny width", _box([10, 10, 0.5, 10]), boxes=[[10, 10, 10.5, 20], SECOND], repairs={"tiny": 1}),
    Case("outside", _box([100, 10, 20, 10]), boxes=ONLY, repairs={"outside": 1}),
    Case("outside to the left", _box([-100, 10, 20, 10]), boxes=ONLY, repairs={"outside": 1}),
    Case("half outside", _box([50, 10, 20, 10]), boxes=[[50, 10, 60, 20], SECOND], repairs={"clipped": 1}),
    Case("negative corner", _box([-5, -5, 20, 20]), boxes=[[0, 0, 15, 15], SECOND], repairs={"clipped": 1}),
    Case("rounding", _box([40, 10, 20.05, 10]), boxes=[[40, 10, 60, 20], SECOND]),
    Case("no box", put("annotations", "bbox", GONE), "annotation 1 has bbox None"),
    Case("box is null", _box(None), "annotation 1 has bbox None"),
    Case("box is empty", _box([]), "annotation 1 has bbox []"),
    Case("three numbers", _box([1, 2, 3]), "annotation 1 has bbox [1, 2, 3]"),
    Case("five numbers", _box([1, 2, 3, 4, 5]), "annotation 1 has bbox [1, 2, 3, 4, 5]"),
    Case("box is an object", _box({"x": 1}), "annotation 1 has bbox {'x': 1}"),
    Case("box is text", _box("10 10 20 10"), "annotation 1 has bbox '10 10 20 10'"),
    Case("null in a box", _box([None, 10, 20, 10]), "annotation 1 has bbox"),
    Case("words in a box", _box(["left", 10, 20, 10]), "annotation 1 has bbox"),
    Case("a list in a box", _box([[10], 10, 20, 10]), "annotation 1 has bbox"),
    Case("numbers as text", _box(["10", "10", "20", "10.0"])),
    Case("numbers with blanks", _box([" 10 ", "10", "20", "10"])),
    Case("all boxes in 0..1", _every("annotations", "bbox", lambda box: [0.1, 0.1, 0.3, 0.2]), "look normalised"),
    Case("all boxes outside", _every("annotations", "bbox", lambda box: [500, 500, 9, 9]), "no box of the train split"),
    Case("all boxes without size", _every("annotations", "bbox", lambda box: [30, 20, 0, 0]), "no box of the train"),
    Case("crowd 1", put("annotations", "iscrowd", 1), crowd=[True, False]),
    Case("crowd as text 0", put("annotations", "iscrowd", "0"), crowd=[False, False]),
    Case("crowd as text 1", put("annotations", "iscrowd", "1"), crowd=[True, False]),
    Case("crowd true", put("annotations", "iscrowd", True), crowd=[True, False]),
    Case("crowd 0.0", put("annotations", "iscrowd", 0.0), crowd=[False, False]),
    Case("crowd null", put("annotations", "iscrowd", None), crowd=[False, False]),
    Case("crowd left out", put("annotations", "iscrowd", GONE), crowd=[False, False]),
    Case("crowd 2", put("annotations", "iscrowd", 2), "annotation 1 has iscrowd 2"),
    Case("crowd no", put("annotations", "iscrowd", "no"), "annotation 1 has iscrowd 'no'"),
    Case("all are crowd", _every("annotations", "iscrowd", lambda crowd: 1), "none of the 3 images"),
    Case("area left out", put("annotations", "area", GONE)),
    Case("area as text", put("annotations", "area", "200")),
    Case("area negative", put("annotations", "area", -3), "annotation 1 has area -3"),
    Case("area NaN", put("annotations", "area", NAN), "annotation 1 has area nan"),
    Case("unknown category", put("annotations", "category_id", 9), "category_id 9, which is not in the list"),
    Case("category as text", put("annotations", "category_id", "2")),
    Case("category as float", put("annotations", "category_id", 2.0)),
    Case("category 1.5", put("annotations", "category_id", 1.5), "annotation 1 has category_id 1.5"),
    Case("category by name", put("annotations", "category_id", "a"), "annotation 1 has category_id 'a'"),
    Case("category null", put("annotations", "category_id", None), "annotation 1 has category_id None"),
    Case("category left out", put("annotations", "category_id", GONE), "annotation 1 has category_id None"),
    Case("orphan", put("annotations", "image_id", 77), "image_id 77, which is not in the list of images"),
    Case("image as text", put("annotations", "image_id", "1")),
    Case("image left out", put("annotations", "image_id", GONE), "annotation 1 has image_id None"),
    Case("image ids are floats", _every("images", "id", float)),
    Case("image ids are numbers as text", _every("images", "id", str)),
    Case("image ids are names", _every("images", "id", lambda id: f"img{id}"), "has id 'img1': give a whole number"),
    Case("image id twice", put("images", "id", 2), "image id 2 occurs twice"),
    Case("image id beyond 64 bit", put("images", "id", 2**70), "give a whole number"),
    Case("ids with gaps", lambda found: _every("annotations", "image_id", lambda id: id * 1000)(
        _every("images", "id", lambda id: id * 1000)(found))),
    Case("annotation id twice", put("annotations", "id", 2), "annotation 2 occurs twice"),
    Case("an annotation without id", put("annotations", "id", GONE), "position 0 has id None"),
    Case("no annotation has an id", lambda found: found | {"annotations": [
        {key: value for key, value in entry.items() if key != "id"} for entry in found["annotations"]]}),
    Case("category id twice", put("categories", "id", 2), "category ids must be unique"),
    Case("category name twice", put("categories", "name", "b"), "names must be unique"),
    Case("category name left out", put("categories", "name", GONE), "has an entry without 'name'"),
    Case("category name null", put("categories", "name", None), "has name None: give a text"),
    Case("category name empty", put("categories", "name", " "), "has no name"),
    Case("category name a number", put("categories", "name", 7), names=["7", "b"]),
    Case("category name unicode", put("categories", "name", "żółw 龟"), names=["żółw 龟", "b"]),
    Case("category id negative", put("categories", "id", -1), "which is not in the list of categories"),
    Case("file name left out", put("images", "file_name", GONE), "has an entry without 'file_name'"),
    Case("file name null", put("images", "file_name", None), "has file_name None"),
    Case("file name empty", put("images", "file_name", ""), "does not lie inside"),
    Case("file is not there", put("images", "file_name", "9.jpg"), "does not exist"),
    Case("a folder for a file", put("images", "file_name", "."), "it is no file"),
    Case("sizes left out", lambda found: put("images", "width", GONE)(put("images", "height", GONE)(found))),
    Case("width left out", put("images", "width", GONE), "has width None"),
    Case("width 0", put("images", "width", 0), "height or width below 1"),
    Case("width negative", put("images", "width", -60), "height or width below 1"),
    Case("width as text", put("images", "width", "60")),
    Case("width as float", put("images", "width", 60.0)),
    Case("width NaN", put("images", "width", NAN), "has width nan: give a whole number"),
    Case("sizes exchanged", lambda found: put("images", "width", 40)(put("images", "height", 60)(found)),
         "its annotations are for 60 x 40"),
    Case("an image without boxes", lambda found: found | {"annotations": found["annotations"][2:]}, boxes=[]),
    Case("unknown keys", put("annotations", "keypoints", [1, 2, 3])),
]  # fmt: skip
assert len({case.name for case in CASES}) == len(CASES)
