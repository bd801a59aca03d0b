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

from dyndet.data.images import Header, find_inside, image_size, read_header, read_image, resolve_inside
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


UPRIGHT = {  # EXIF 2.3, figure of orientations: where row 0 and column 0 of the stored array are seen
    1: COLOURS,
    2: COLOURS[:, ::-1],
    3: COLOURS[::-1, ::-1],
    4: COLOURS[::-1],
    5: COLOURS.transpose(1, 0, 2),
    6: COLOURS.transpose(1, 0, 2)[:, ::-1],
    7: COLOURS.transpose(1, 0, 2)[::-1, ::-1],
    8: COLOURS.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_images_are_turned_by_their_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    path, exif = tmp_path / f"turned.{suffix}", Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(COLOURS).save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    expected = UPRIGHT[orientation]
    size = (expected.shape[0], expected.shape[1])
    assert read_header(path) == Header((5, 7), orientation)
    assert image_size(path) == size
    np.testing.assert_array_equal(pixels(path), expected)
    for image in (read_image(path, annotated=size), read_image(path, upright=True)):
        np.testing.assert_array_equal(image.permute(1, 2, 0), expected)
    stored = read_image(path, annotated=(5, 7), upright=False)  # annotations that know the stored pixels
    np.testing.assert_array_equal(stored.permute(1, 2, 0), COLOURS)
    if size != (5, 7):
        np.testing.assert_array_equal(read_image(path, annotated=(5, 7)).permute(1, 2, 0), COLOURS)
        np.testing.assert_array_equal(read_image(path, annotated=size, upright=False).permute(1, 2, 0), expected)


def test_orientation_behind_the_pixels_of_a_png_counts(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(COLOURS), "PNG", exif=exif)
    first, end = data.index(b"eXIf") - 4, data.index(b"IDAT") - 4
    chunk, tail = data[first:end], data.index(b"IEND") - 4
    (tmp_path / "a.png").write_bytes(data[:first] + data[end:tail] + chunk + data[tail:])
    assert read_header(tmp_path / "a.png") == Header((5, 7), 6)
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), UPRIGHT[6])
    (tmp_path / "torn.png").write_bytes(data[:first] + data[end:tail])  # ends before its last chunk
    assert read_header(tmp_path / "torn.png").orientation == 1


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("data", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"\0" * 40, b"Exif\0\0II*\0"])
def test_broken_exif_does_not_matter(tmp_path: Path, data: bytes) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "a.png", exif=data)
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), COLOURS)
    for wrong in (0, 9, 700):
        exif = Image.Exif()
        exif[0x0112] = wrong
        Image.fromarray(COLOURS).save(tmp_path / "b.png", exif=exif)
        assert read_header(tmp_path / "b.png").orientation == 1


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
        "float beyond any range": encoded(Image.fromarray(np.full((2, 2), 1e6, np.float32)), "TIFF"),
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
        "..\\secret.jpg",
        "sub\\..\\..\\secret.jpg",
        "outside/../../secret.jpg",
    ],
)
def test_names_that_leave_the_root_are_refused(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "root_of_another"):
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(folder / "secret.jpg")
    (root / "outside").symlink_to(tmp_path)
    with pytest.raises(DataError, match="does not lie inside"):
        resolve_inside(root, name)
    with pytest.raises(DataError, match="does not lie inside"):
        find_inside(root, name)


def test_links_are_followed_to_files_and_folders_alone(tmp_path: Path) -> None:
    root, disk = tmp_path / "root", tmp_path / "disk"
    for folder in (root, disk):
        folder.mkdir()
    Image.fromarray(COLOURS).save(disk / "a.png")
    (root / "link.png").symlink_to(disk / "a.png")
    (root / "folder").symlink_to(disk)
    (root / "device.png").symlink_to("/dev/zero")
    (root / "gone.png").symlink_to(disk / "gone.png")
    for name in ("link.png", "folder/a.png"):
        np.testing.assert_array_equal(pixels(resolve_inside(root, name)), COLOURS)
    # By its text, not by way of the link: that would leave the root.
    assert resolve_inside(root, "folder/../link.png") == root / "link.png"
    with pytest.raises(DataError, match=r"'device\.png' .* is a link to a device"):
        resolve_inside(root, "device.png")
    with pytest.raises(DataError, match=r"gone\.png does not exist"):
        read_image(resolve_inside(root, "gone.png"))
    with pytest.raises(DataError, match="cannot be decoded"):
        read_image("/dev/zero")


@pytest.mark.parametrize(
    ("written", "there"),
    [
        ("train\\0001.jpg", "train/0001.jpg"),
        (".\\train\\0001.jpg", "train/0001.jpg"),
        ("train/a%20b%281%29.jpg", "train/a b(1).jpg"),
        ("train\\a%20b.jpg", "train/a b.jpg"),
        ("train/caf\u00e9.jpg", "train/cafe\u0301.jpg"),
        ("train/cafe\u0301.jpg", "train/caf\u00e9.jpg"),
        ("train/caf%C3%A9.jpg", "train/cafe\u0301.jpg"),
        ("train/100%.jpg", "train/100%.jpg"),
        ("train/%41.jpg", "train/%41.jpg"),
    ],
)
def test_names_that_other_systems_wrote_are_found(tmp_path: Path, written: str, there: str) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / there).touch()
    (tmp_path / "train" / "A.jpg").touch()  # the exact name goes first
    assert find_inside(tmp_path, written).samefile(tmp_path / there)


def test_a_name_that_fits_two_files_or_leads_out_when_decoded_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "x").mkdir(parents=True)
    for name in ("x/b%20c.jpg", "x/b c.jpg"):
        (root / name).touch()
    with pytest.raises(DataError, match=r"could be 'b%20c\.jpg' or 'b c\.jpg': rename one"):
        find_inside(root, "x\\b%20c.jpg")
    (tmp_path / "secret.jpg").touch()
    with pytest.raises(DataError, match="does not lie inside"):
        find_inside(root, "%2e%2e/secret.jpg")
    assert find_inside(root, "gone%20.jpg") == root / "gone%20.jpg"
