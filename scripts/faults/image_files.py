"""R6: image files of every kind, and what loading, training and the commands make of them."""

from __future__ import annotations

import csv
import io
import json
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from dyndet.data.coco import CocoDataset
from dyndet.data.datamodule import DetectionDataModule
from dyndet.data.images import read_image
from dyndet.data.mixup import MixUp
from dyndet.data.mosaic import Mosaic
from dyndet.data.transforms import Resize
from dyndet.errors import DataError
from faults.row import Outcome, Row

EACH = 20
COUNT = 6  # images of a set


def _noise(rng: random.Random, mode: str = "RGB") -> Image.Image:
    size = rng.randint(20, 60), rng.randint(20, 60)
    return Image.effect_noise(size, rng.randint(30, 90)).convert(mode)


def _bytes(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _truncated(rng: random.Random) -> bytes:
    data = _bytes(_noise(rng), rng.choice(["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP"]))
    return data[: int(len(data) * rng.uniform(0.05, 0.8))]


def _wrong_type(rng: random.Random) -> bytes:
    starts = (b"PK\x03\x04", b"%PDF-1.7\n", b"\x00\x00\x00 ftypisom", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x7fELF", b"RIFF")
    return rng.choice(starts) + rng.randbytes(rng.randint(10, 2000))


def _html(rng: random.Random) -> bytes:
    return b"<!DOCTYPE html><html>" + b"404 " * rng.randint(1, 500) + b"</html>"


def _sixteen(rng: random.Random) -> bytes:
    values = np.frombuffer(rng.randbytes(2 * 30 * 40), np.uint16).reshape(30, 40)
    return _bytes(Image.fromarray(values), rng.choice(["PNG", "TIFF"]))


def _turned(rng: random.Random) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = rng.randint(2, 8)
    return _bytes(_noise(rng), "JPEG", quality=95, exif=tags)


def _animated(rng: random.Random) -> bytes:
    frames = [_noise(rng).resize((40, 30)) for _ in range(rng.randint(2, 5))]
    kind = rng.choice(["GIF", "WEBP", "PNG"])
    return _bytes(frames[0], kind, save_all=True, append_images=frames[1:])


def _bomb(rng: random.Random) -> bytes:
    """A PNG of a few bytes whose header tells of 100 to 900 megapixels."""
    side = rng.randint(10_000, 30_000)
    data = bytearray(_bytes(Image.new("L", (1, 1)), "PNG"))
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


KINDS: dict[str, tuple[bool, Callable[[random.Random], bytes]]] = {
    "truncated": (False, _truncated),
    "no byte": (False, lambda rng: b""),
    "wrong type": (False, _wrong_type),
    "html": (False, _html),
    "cmyk": (True, lambda rng: _bytes(_noise(rng, "CMYK"), rng.choice(["JPEG", "TIFF"]))),
    "16 bit": (True, _sixteen),
    "palette": (True, lambda rng: _bytes(_noise(rng).convert("P"), rng.choice(["PNG", "GIF"]))),
    "alpha": (True, lambda rng: _bytes(_noise(rng, rng.choice(["RGBA", "LA"])), "PNG")),
    "exif": (True, _turned),
    "animated": (True, _animated),
    "1 x 1": (True, lambda rng: _bytes(Image.new("RGB", (1, 1), (rng.randint(0, 255),) * 3), "PNG")),
    "1 x 5000": (True, lambda rng: _bytes(Image.new("RGB", rng.choice([(1, 5000), (5000, 1)])), "PNG")),
    "bomb": (False, _bomb),
}
"""Whether it can be read, and the bytes of one."""


def _read(folder: Path) -> Iterator[Outcome]:
    """One by one: the right pixels, or one line that names the file."""
    for number, (kind, (readable, make)) in product(range(EACH), KINDS.items()):
        file = folder / f"{kind}_{number}.jpg"
        file.write_bytes(make(random.Random(f"{kind} {number}")))
        case = f"{kind} {number}"
        try:
            pixels = read_image(file)
        except DataError as error:
            yield Outcome(case, not readable and _one_line(error, file), str(error))
        else:
            yield Outcome(case, readable and (kind == "16 bit" or _as_pillow(file, pixels)), "read otherwise")


def _as_pillow(file: Path, pixels: torch.Tensor) -> bool:
    with Image.open(file) as image:
        whole = ImageOps.exif_transpose(image)
        expected = np.asarray((whole.convert("RGBA") if "transparency" in whole.info else whole).convert("RGB"))
    return bool((pixels.permute(1, 2, 0).numpy() == expected).all())


def _one_line(error: Exception, *named: object) -> bool:
    return "\n" not in str(error) and all(str(name) in str(error) for name in named)


def coco_set(folder: Path, files: Sequence[bytes]) -> Path:
    """Images whose annotations do not tell their sizes where they can be read, as a json."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number, data in enumerate(files, start=1):
        path = folder / "images" / f"{number}.jpg"
        path.write_bytes(data)
        try:
            pixels = read_image(path)
            height, width = pixels.shape[1:]
        except DataError:
            height, width = 32, 32
        images.append({"id": number, "file_name": path.name, "height": height, "width": width})
        box = [0, 0, width, height]
        annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": box})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    (folder / "a.json").write_text(json.dumps(content))
    return folder / "a.json"


def data_of(file: Path, on_error: str, workers: int = 0, mixed: bool = False, most: int = 100) -> DetectionDataModule:
    skip = {"on_error": on_error}
    read = partial(CocoDataset, file, file.parent / "images", **skip)
    return DetectionDataModule(
        train=read,
        val=read,
        batch_size=3,
        num_workers=workers,
        train_mix=MixUp(Mosaic(32), p=0.5) if mixed else None,
        train_transform=None if mixed else Resize((32, 32)),
        val_transform=Resize((32, 32)),
        max_errors=most,
        on_error="skip" if on_error == "skip" else "raise",
    )


def _policies(folder: Path) -> Iterator[Outcome]:
    """A set with one such file, loaded by both policies."""
    for number, (kind, (readable, make)), on_error in product(range(EACH), KINDS.items(), ("raise", "skip")):
        rng = random.Random(f"{kind} {number}")
        place = folder / f"{kind}_{number}_{on_error}"
        good = [_bytes(_noise(rng), "JPEG") for _ in range(COUNT - 1)]
        odd = rng.randrange(COUNT)
        file = coco_set(place, [*good[:odd], make(rng), *good[odd:]])
        bad = place / "images" / f"{odd + 1}.jpg"
        yield _loaded(f"{kind} {number} {on_error}", file, bad, on_error, readable, mixed=number % 2 == 1)


def _loaded(case: str, file: Path, bad: Path, on_error: str, readable: bool, mixed: bool) -> Outcome:
    try:
        data = data_of(file, on_error, mixed=mixed)
        data.quarantine.keep(file.parent)
        data.setup()
        trained = sum(len(batch.targets) for batch in data.train_dataloader())
        validated = sum(len(batch.targets) for batch in data.val_dataloader())
    except DataError as error:
        fine = on_error == "raise" and not readable and _one_line(error, bad, "data.on_error=skip")
        return Outcome(case, fine, str(error))
    listed = file.parent / "quarantine.csv"
    rows = list(csv.reader(listed.open())) if listed.is_file() else []
    expected = [] if readable else [["file", str(bad)]]
    names = [[row[0] for row in rows]] if rows else []
    left = COUNT if readable else COUNT - 1
    fine = (readable or on_error == "skip") and trained == COUNT and validated == left and names == expected
    return Outcome(case, fine, f"{trained} trained, {validated} validated, listed {rows}")


def _all_bad(folder: Path) -> Iterator[Outcome]:
    """Nothing can be read, or more than is put up with: one line, and an end."""
    bad = [kind for kind, (readable, _) in KINDS.items() if not readable]
    for number, (kind, on_error, most) in enumerate(product(bad, ("raise", "skip"), (0, 3, 100))):
        rng = random.Random(number)
        place = folder / str(number)
        file = coco_set(place, [KINDS[kind][1](rng) for _ in range(COUNT)])
        case = f"{kind}, {on_error}, max_errors={most}"
        try:
            data = data_of(file, on_error, most=most)
            data.setup()
            count = sum(len(batch.targets) for batch in data.train_dataloader())
            yield Outcome(case, False, f"{count} images of nothing")
        except DataError as error:
            yield Outcome(case, _one_line(error, place), str(error))


def _workers(folder: Path) -> Iterator[Outcome]:
    """The same replacements whatever the number of workers."""
    for number, mixed in product(range(3), (False, True)):
        rng = random.Random(number)
        files = [_bytes(_noise(rng), "JPEG") for _ in range(9)]
        for place in rng.sample(range(9), 3):
            files[place] = _truncated(rng)
        file = coco_set(folder / f"{number}{mixed}", files)
        seen = []
        for workers in (0, 1, 2):
            data = data_of(file, "skip", workers, mixed)
            data.setup()
            epoch = [batch.images.pixels for batch in data.train_dataloader()]
            seen.append((epoch, sorted(data.quarantine.faults)))
        (first, faults), *others = seen
        same = all(
            len(first) == len(epoch) and all(map(torch.equal, first, epoch)) and faults == found
            for epoch, found in others
        )
        yield Outcome(f"{'mosaics' if mixed else 'images'} {number}", same and len(faults) == 3, f"{seen[0][1]}")


def _tolerant(folder: Path) -> Iterator[Outcome]:
    """A few bytes short: read by key; much shorter: refused. What is there is as in the whole file."""
    for number, (kind, short) in enumerate(product(("JPEG", "PNG", "BMP", "TIFF"), (1, 2, 7, 20, 0.5, 0.8))):
        image = Image.effect_noise((200, 300), 60).convert("RGB")
        data = _bytes(image, kind)
        cut = data[: -int(short)] if short >= 1 else data[: int(len(data) * (1 - short))]
        whole, file = folder / f"{number}.whole", folder / f"{number}.{kind.lower()}"
        whole.write_bytes(data)
        file.write_bytes(cut)
        case = f"{kind} short of {short if short >= 1 else f'{short:.0%} of its'} bytes"
        try:
            pixels = read_image(file, tolerant=True)
        except DataError as error:
            yield Outcome(case, short < 1 and _one_line(error, file), str(error))
            continue
        rows = (pixels == read_image(whole)).all(0).all(1)
        yield Outcome(case, short >= 1 and float(rows.float().mean()) > 0.9, f"read, {int(rows.sum())} rows are right")


ROWS = [
    Row(
        "R6.1",
        "image files of 13 kinds: truncated, no byte, wrong type, HTML, CMYK, 16 bit, palette, alpha, EXIF, animated, "
        "1 x 1, 1 x 5000, bomb",
        "read as a viewer shows them, or refused in one line with the file",
        _read,
        20,
    ),
    Row(
        "R6.2",
        "one such file in a set, by both policies, half of the sets with mosaics",
        "raise: one line with file and way out; skip: an epoch of all images and a validation without it, listed once",
        _policies,
        80,
    ),
    Row("R6.3", "no image can be read, or more than data.max_errors", "one line, no endless loop", _all_bad, 5),
    Row("R6.4", "unreadable images loaded by 0, 1 and 2 workers", "the same pixels take their places", _workers, 30),
    Row("R6.5", "images short of some bytes, data.tolerant=true", "a few bytes: read; half: refused", _tolerant, 5),
]
