"""R18: small files that would fill the memory."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dyndet.data.coco import CocoDataset
from dyndet.data.images import image_size, read_image
from dyndet.data.yolo import YoloDataset
from dyndet.errors import DataError
from faults.row import Outcome, Row

LIMIT = 400
"""MB that a process may need more than before; the largest image that is read takes 192 three times at most."""


def _peak(work: Callable[[], Any], connection: Any) -> None:
    """In a process of its own: what is said, and by how many MB its memory grew at most."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _memory("VmRSS")
    try:
        said = f"read: {work()}"
    except DataError as error:
        said = str(error)
    except Exception as error:  # told, not hidden
        said = f"TRACEBACK {type(error).__name__}: {error}"
    connection.send((said, _memory("VmHWM") - before))


def _memory(key: str) -> float:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def _png(file: Path, width: int, height: int, mode: int = 0) -> None:
    """Of one colour: a thousandth of its pixels on disk."""
    channels = {0: 1, 2: 3, 6: 4}[mode]
    packer = zlib.compressobj(9)
    row = b"\0" * (width * channels + 1)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, mode, 0, 0, 0])
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    parts = (
        len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
        for kind, body in chunks
    )  # fmt: skip
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def _text_chunk(file: Path) -> None:
    """A PNG with 500 MB of text, packed."""
    Image.new("RGB", (10, 10)).save(file)
    packer = zlib.compressobj(9)
    body = b"Comment\0\0" + b"".join(packer.compress(b"a" * 1_000_000) for _ in range(500)) + packer.flush()
    chunk = len(body).to_bytes(4, "big") + b"zTXt" + body + zlib.crc32(b"zTXt" + body).to_bytes(4, "big")
    data = file.read_bytes()
    file.write_bytes(data[:33] + chunk + data[33:])


def _coco(folder: Path, text: bytes) -> Callable[[], Any]:
    file = folder / "a.json"
    file.write_bytes(text)
    return lambda: len(CocoDataset(file, folder))


def _yolo(folder: Path, text: str) -> Callable[[], Any]:
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    Image.new("RGB", (40, 30)).save(folder / "images" / "1.jpg")
    (folder / "labels" / "1.txt").write_text(text)
    (folder / "data.yaml").write_text("train: images\nnames: [a]\n")
    return lambda: len(YoloDataset(folder / "data.yaml")[0].target.boxes)


def _sparse(folder: Path) -> Callable[[], Any]:
    """A label file of 10 GB, none of them on disk."""
    work = _yolo(folder, "")
    with (folder / "labels" / "1.txt").open("wb") as stream:
        stream.truncate(10 * 2**30)
    return work


def _runs(folder: Path) -> Callable[[], Any]:
    """A mask whose runs are for another image, 30,000 times as high."""
    Image.new("RGB", (40, 30)).save(folder / "1.jpg")
    runs = {"size": [1_000_000, 1_000_000], "counts": [10**12]}
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "iscrowd": 1, "segmentation": runs}
    image = {"id": 1, "file_name": "1.jpg", "height": 30, "width": 40}
    content = {"images": [image], "annotations": [annotation], "categories": [{"id": 1, "name": "a"}]}
    (folder / "a.json").write_text(json.dumps(content))
    return lambda: CocoDataset(folder / "a.json", folder, load_masks=True)[0].target.boxes.shape


def _images(folder: Path, width: int, height: int, mode: int = 0) -> Callable[[], Any]:
    file = folder / "a.png"
    _png(file, width, height, mode)
    return lambda: tuple(read_image(file).shape)


def _header(folder: Path) -> Callable[[], Any]:
    file = folder / "a.png"
    _png(file, 20_000, 20_000)
    return lambda: image_size(file)


def _packed(folder: Path) -> Callable[[], Any]:
    file = folder / "a.png"
    _text_chunk(file)
    return lambda: tuple(read_image(file).shape)


def _frames(folder: Path) -> Callable[[], Any]:
    """An animation whose first frame is all that is read."""
    file = folder / "a.gif"
    frames = [Image.fromarray(np.full((500, 500), value, np.uint8)) for value in range(200)]
    frames[0].save(file, save_all=True, append_images=frames[1:])
    return lambda: tuple(read_image(file).shape)


BOMBS: dict[str, tuple[bool, Callable[[Path], Callable[[], Any]]]] = {
    "a PNG of 100 megapixels": (False, lambda folder: _images(folder, 10_000, 10_000)),
    "json nested 5 million deep": (False, lambda folder: _coco(folder, b"[" * 5_000_000)),
    "json of 5 million digits": (False, lambda folder: _coco(folder, b'{"images": ' + b"9" * 5_000_000 + b"}")),
    "a label line of 60 MB": (False, lambda folder: _yolo(folder, "0 " + "0.5 " * 15_000_000)),
    "a label word of 60 MB": (False, lambda folder: _yolo(folder, "0 0.5 0.5 0.5 0." + "5" * 60_000_000)),
    "a label file of 10 GB": (False, _sparse),
    "a mask of 10^12 pixels": (False, _runs),
    "a PNG of 400 megapixels": (False, lambda folder: _images(folder, 20_000, 20_000)),
    "a PNG of 400 megapixels with alpha": (False, lambda folder: _images(folder, 20_000, 20_000, 6)),
    "a PNG 65 million pixels wide": (False, lambda folder: _images(folder, 65_000_000, 1)),
    "the size of 400 megapixels": (False, _header),
    "a PNG with 500 MB of text": (False, _packed),
    "an animation of 200 frames": (True, _frames),
}
"""Whether it is read, and what reads it."""


def _inject(folder: Path) -> Iterator[Outcome]:
    context = get_context("fork")
    for number, (kind, (readable, prepare)) in enumerate(BOMBS.items()):
        place = folder / str(number)
        place.mkdir()
        work = prepare(place)
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_peak, args=(work, sender))
        process.start()
        sender.close()
        try:
            said, grown = receiver.recv()
        except EOFError:
            said, grown = "TRACEBACK the process died", float("inf")
        process.join()
        fine = grown < LIMIT and "\n" not in said and said.startswith("read") == readable and "TRACEBACK" not in said
        yield Outcome(kind, fine, f"{grown:.0f} MB: {said[:200]}")


ROWS = [
    Row(
        "R18.1",
        "images, jsons and label files that would fill the memory",
        f"less than {LIMIT} MB, refused in one line",
        _inject,
        40,
    )
]
