from __future__ import annotations

import struct
import time
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dyndet.data.images import image_size, read_image, resolve_inside
from dyndet.errors import DataError

COLOURS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(path: Path) -> np.ndarray:
    return read_image(path).permute(1, 2, 0).numpy()


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds next to nothing."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    body = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.webp", "wrong_suffix.jpg"])
def test_colours_and_layout_are_exact(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    kind = {".png": "PNG", ".bmp": "BMP", ".tif": "TIFF", ".webp": "WEBP", ".jpg": "PNG"}[path.suffix]
    path.write_bytes(encoded(Image.fromarray(COLOURS), kind, **({"lossless": True} if kind == "WEBP" else {})))
    image = read_image(path)
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    assert image.shape == (3, 5, 7)
    assert image_size(path) == (5, 7)
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), COLOURS)


def test_grey_and_palette_become_rgb(tmp_path: Path) -> None:
    grey = Image.fromarray(COLOURS[..., 0])
    grey.save(tmp_path / "grey.png")
    np.testing.assert_array_equal(pixels(tmp_path / "grey.png"), COLOURS[..., :1].repeat(3, 2))
    Image.fromarray(COLOURS[..., 0] > 127).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(pixels(tmp_path / "bits.png"), (COLOURS[..., :1] > 127).repeat(3, 2) * np.uint8(255))

    index = np.arange(6, dtype=np.uint8).reshape(2, 3)
    table = np.random.default_rng(1).integers(0, 256, (6, 3), dtype=np.uint8)
    palette = Image.fromarray(index).convert("P")
    palette.putpalette(table.tobytes())
    palette.save(tmp_path / "palette.png", transparency=bytes([0, 128, 255, 255, 255, 255]))
    np.testing.assert_array_equal(pixels(tmp_path / "palette.png"), table[index])


def test_alpha_is_dropped_and_16_bit_keeps_the_high_byte(tmp_path: Path) -> None:
    alpha = np.concatenate([COLOURS, np.zeros((5, 7, 1), np.uint8)], 2)
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(pixels(tmp_path / "alpha.png"), COLOURS)

    deep = np.array([[0, 255, 256], [32768, 65280, 65535]], np.uint16)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        assert read_image(tmp_path / name)[1].tolist() == [[0, 0, 1], [128, 255, 255]]


def test_cmyk_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    red = Image.new("RGB", (16, 16), (200, 30, 40)).convert("CMYK")
    red.save(tmp_path / "cmyk.jpg", quality=95)
    expected = np.full((16, 16, 3), (200, 30, 40))
    np.testing.assert_allclose(pixels(tmp_path / "cmyk.jpg"), expected, atol=6)


def test_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it by 90 degrees
    Image.fromarray(COLOURS).save(tmp_path / "turned.png", exif=exif)
    assert image_size(tmp_path / "turned.png") == (5, 7)
    np.testing.assert_array_equal(pixels(tmp_path / "turned.png"), COLOURS)


def test_first_frame_of_an_animation_and_extreme_shapes(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.gif")[:, 0, 0].tolist() == [255, 0, 0]
    for size in ((1, 1), (5000, 1)):
        Image.new("RGB", size).save(tmp_path / "thin.png")
        assert read_image(tmp_path / "thin.png").shape == (3, size[1], size[0])


JPEG = encoded(Image.fromarray(COLOURS.repeat(20, 0).repeat(20, 1)), "JPEG")
PNG = encoded(Image.fromarray(COLOURS.repeat(20, 0).repeat(20, 1)), "PNG")


@pytest.mark.parametrize(
    "content",
    {
        "empty": b"",
        "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "half a jpeg": JPEG[: len(JPEG) // 2],
        "jpeg header": JPEG[:30],
        "half a png": PNG[: len(PNG) // 2],
        "png with a flipped byte": PNG[:60] + bytes([PNG[60] ^ 255]) + PNG[61:],
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "float": encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"),
    }.items(),
    ids=lambda item: item[0],
)
def test_broken_files_name_themselves(tmp_path: Path, content: tuple[str, bytes]) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(content[1])
    with pytest.raises(DataError, match=r"broken\.jpg cannot be decoded"):
        read_image(path)


@pytest.mark.parametrize("offset", range(0, len(JPEG), max(1, len(JPEG) // 40)))
def test_every_truncation_is_an_error_not_a_grey_image(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "cut.jpg"
    path.write_bytes(JPEG[:offset])
    with pytest.raises(DataError, match=r"cut\.jpg"):
        read_image(path)


def test_missing_files_folders_and_circles(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(DataError, match="cannot be decoded"):
        read_image(resolve_inside(tmp_path, "circle/a.jpg"))
    with pytest.raises(DataError, match=r"gone\.jpg does not exist"):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(DataError, match=r"gone\.jpg does not exist"):
        image_size(tmp_path / "gone.jpg")
    with pytest.raises(DataError, match="cannot be decoded"):
        read_image(tmp_path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8_001, 10_000, 20_000])
def test_bombs_are_refused_by_their_header(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(side, side))
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"bomb\.png .*limit"):
        read_image(path)
    assert time.perf_counter() - start < 1


def test_the_pixel_limit_is_exact(tmp_path: Path) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", max_pixels=35).shape == (3, 5, 7)
    with pytest.raises(DataError, match="7 x 5 pixels, more than the limit of 34"):
        read_image(tmp_path / "a.png", max_pixels=34)


def test_names_that_stay_inside_are_joined(tmp_path: Path) -> None:
    (tmp_path / "root" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "inner").symlink_to(tmp_path / "root" / "sub")
    root = tmp_path / "root"
    assert resolve_inside(root, "sub/a b.jpg") == root / "sub" / "a b.jpg"
    for name in ("sub/../a.jpg", "..a.jpg", "a..jpg", "%2e%2e/a.jpg", "inner/a.jpg", str(root / "a.jpg")):
        assert resolve_inside(root, name).resolve().is_relative_to(root)
        assert resolve_inside(tmp_path / "link", name).resolve().is_relative_to(root)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "../secret.jpg",
        "../../secret.jpg",
        "sub/../../secret.jpg",
        "../root_of_another/secret.jpg",
        "/etc/passwd",
        "//host/share/secret.jpg",
        "\\\\host\\share\\secret.jpg",
        "C:\\secret.jpg",
        "a.jpg\0.txt",
        "link.jpg",
        "outside/secret.jpg",
    ],
)
def test_names_that_leave_the_root_are_refused(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "root_of_another"):
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(folder / "secret.jpg")
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "outside").symlink_to(tmp_path)
    with pytest.raises(DataError, match="does not lie inside"):
        resolve_inside(root, name)
