"""Image files, which may be anything: read safely, as RGB, upright.

Images are turned by their EXIF orientation, as viewers and annotation tools show them, so annotations fit. Where the
size that comes with the annotations is only that of the stored pixels, it is these that are read (`read_image`).
"""

from __future__ import annotations

import os
import stat
import struct
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, cast
from urllib.parse import unquote

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.ImageFile import ImageFile
from torch import Tensor

from dyndet.data.pixel_values import to_rgb
from dyndet.data.truncated import check_complete, truncated_allowed
from dyndet.data.user_paths import lies_there
from dyndet.errors import DataError, MissingDataError
from dyndet.structures import Size

MAX_PIXELS = 64_000_000
"""A decoded image of this many pixels takes 192 MB."""

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
"""Of files that count as images when a folder is listed."""

UNREAD = frozenset(
    {".heic", ".heif", ".avif", ".jp2", ".jxl", ".svg", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw", ".exr"}
)
"""Of files that are images, too, but are not read: said where they lie among others."""

# Pillow knows many more, some of which start other programs (EPS) or are rarely tested.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")

_ORIENTATION, _WIDTH, _LENGTH = 0x0112, 256, 257  # tags of EXIF and TIFF

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation."""

_BACK = _TURNS | {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


@dataclass(frozen=True, slots=True)
class Header:
    """What an image file says before its pixels.

    Attributes:
        stored: (H, W) of the stored pixels.
        orientation: 1..8, of EXIF; 1 when there is none.
    """

    stored: Size
    orientation: int = 1

    @property
    def upright(self) -> Size:
        """(H, W) as a viewer shows the image."""
        return (self.stored[1], self.stored[0]) if self.orientation >= 5 else self.stored

    def reads_upright(self, annotated: Size | None, upright: bool = True) -> bool:
        """Whether to turn the image: by the size that its annotations are for, else `upright`."""
        if annotated is None or self.stored == self.upright:
            return upright
        return annotated != self.stored


def read_image(
    path: str | Path,
    *,
    annotated: Size | None = None,
    upright: bool = True,
    max_pixels: int = MAX_PIXELS,
    tolerant: bool = False,
) -> Tensor:
    """Decodes an image file to uint8 (3, H, W) RGB, upright.

    Grey is repeated, palettes and CMYK are converted, alpha is dropped; `dyndet.data.pixel_values` tells what counts as
    white in files of more than 8 bit. Of an animation the first frame is read.

    Args:
        path: JPEG, PNG, BMP, WebP, TIFF, GIF or PPM.
        annotated: (H, W) that the annotations are for: where only the stored pixels have it, they are not turned.
        upright: whether the image is turned by its EXIF orientation where sizes do not tell.
        max_pixels: more are refused, judged by the header alone.
        tolerant: reads files whose last bytes are missing, too; what is not there is black or grey.

    Raises:
        DataError: if the file is missing, empty, truncated, too large or not an image.
    """
    try:
        return _decoded(path, annotated, upright, max_pixels)
    except DataError:
        if not tolerant:
            raise
    with truncated_allowed():
        return _decoded(path, annotated, upright, max_pixels, check_complete)


def _decoded(
    path: str | Path,
    annotated: Size | None,
    upright: bool,
    max_pixels: int,
    check: Callable[[NDArray[np.uint8]], None] = lambda pixels: None,
) -> Tensor:
    with _opened(path, max_pixels) as (image, header):
        turn = header.reads_upright(annotated, upright)
        rgb = to_rgb(image)
        check(np.asarray(rgb))
        if image.format == "TIFF":  # Pillow has turned it
            rgb = rgb if turn else _transposed(rgb, _BACK, header)
        elif turn:
            rgb = _transposed(rgb, _TURNS, header)
        pixels = np.array(rgb)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_header(path: str | Path) -> Header:
    """Size and orientation, without decoding.

    Raises:
        DataError: if the file is missing or does not start like an image.
    """
    with _opened(path) as (_, header):
        return header


def image_size(path: str | Path) -> Size:
    """(H, W) of the upright image from the header, without decoding.

    Raises:
        DataError: if the file is missing or does not start like an image.
    """
    return read_header(path).upright


def resolve_inside(root: str | Path, name: str | Path) -> Path:
    """`root / name` for a name that comes out of a data file and must not lead elsewhere.

    A name is judged by its text: `..` and absolute paths that leave `root` are refused, with backslashes too. Links are
    the doing of whoever owns the folder, not of the file that names them, and are followed: data often lies on another
    disk. They must lead to a plain file or a folder (a device would be read without end), and what is read through them
    is decoded as an image or parsed as annotations, never copied.

    Raises:
        DataError: if the name leaves `root` by `..` or as an absolute path, or leads to a device.
    """
    text = str(name)
    if not _lies_in(root, text):
        raise DataError(f"file name {text!r} does not lie inside {root}: name a file in that folder")
    path = Path(root, os.path.normpath(text) if ".." in text else text)
    try:
        special = path.is_symlink() and not (path.is_file() or path.is_dir()) and path.exists()
    except OSError:  # a link to itself, say: not found when it is read
        special = False
    if special:
        raise DataError(f"file name {text!r} in {root} is a link to a device: remove it")
    return path


def find_inside(root: str | Path, name: str | Path) -> Path:
    """`resolve_inside` for names that another system may have written.

    Where no file has exactly this name, backslashes may separate folders, characters may be percent-encoded, and
    accents composed otherwise (macOS).

    Raises:
        DataError: as `resolve_inside`, or if several files would fit.
    """
    path, text = resolve_inside(root, name), str(name)
    if (text.isascii() and "\\" not in text and "%" not in text) or lies_there(path):
        return path
    plain = [text, text.replace("\\", "/")]
    plain += [unquote(form) for form in plain]
    forms = dict.fromkeys(unicodedata.normalize(kind, form) for form in plain for kind in ("NFC", "NFD"))
    others = [resolve_inside(root, form) for form in forms if form]
    found = [other for other in others if lies_there(other) and other.is_file()]
    if len(found) > 1 and not all(other.samefile(found[0]) for other in found):
        raise DataError(f"file name {text!r} in {root} could be {found[0].name!r} or {found[1].name!r}: rename one")
    return found[0] if found else path


def _lies_in(root: str | Path, text: str) -> bool:
    if not text or "\0" in text or PureWindowsPath(text).drive:
        return False
    if ".." not in text and text[0] not in "/\\":
        return True
    top = Path(os.path.normpath(Path(root).absolute()))
    tops = (top, Path(os.path.realpath(root)))  # a root that is a link has two names
    paths = [Path(os.path.normpath(top / form)) for form in (text, text.replace("\\", "/"))]
    return all(any(path.is_relative_to(one) for one in tops) for path in paths)


@contextmanager
def _opened(path: str | Path, max_pixels: int | None = None) -> Iterator[tuple[Image.Image, Header]]:
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise ValueError("it is no file")
        with Image.open(path, formats=_FORMATS) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise DataError(
                    f"image {path} has {image.width} x {image.height} pixels, more than the limit of {max_pixels}: "
                    "shrink it or cut it into tiles"
                )
            yield image, _header(image)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise MissingDataError(
            f"image {path} does not exist: check the image folder and the names in the annotations"
        ) from error
    except Exception as error:  # Pillow's decoders raise nearly anything on hostile bytes
        raise DataError(f"image {path} cannot be decoded ({error}): replace it or remove it from the set") from error


def _header(image: Image.Image) -> Header:
    tags: Any = getattr(image, "tag_v2", None)
    if tags is not None:  # its size is the upright one already
        return Header((int(tags[_LENGTH]), int(tags[_WIDTH])), _orientation(tags.get(_ORIENTATION)))
    data = image.info.get("exif")
    if data is None and image.format == "PNG":
        data = _behind_pixels(image)
    return Header((image.height, image.width), _orientation(_exif(data)))


def _behind_pixels(image: Image.Image) -> bytes | None:
    """EXIF of a PNG whose pixels come first, as exiftool writes it: Pillow would find it when it decodes."""
    file = cast(ImageFile, image).fp
    assert file is not None  # until its pixels are read
    place = file.tell()
    try:
        file.seek(8)
        while len(start := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", start)
            if kind in (b"eXIf", b"IEND"):
                return file.read(length) if kind == b"eXIf" else None
            file.seek(length + 4, os.SEEK_CUR)
        return None
    finally:
        file.seek(place)


def _exif(data: bytes | None) -> object:
    if not data:
        return None
    try:
        tags = Image.Exif()
        tags.load(data)
        return tags.get(_ORIENTATION)
    except Exception:  # broken EXIF makes no broken image
        return None


def _orientation(value: object) -> int:
    return value if isinstance(value, int) and value in _TURNS else 1


def _transposed(image: Image.Image, turns: dict[int, Image.Transpose], header: Header) -> Image.Image:
    return image if header.orientation == 1 else image.transpose(turns[header.orientation])
