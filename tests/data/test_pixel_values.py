"""Known values in files of every type."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dyndet.data.images import read_image
from dyndet.errors import DataError

COLOURS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def tiff(path: Path, values: np.ndarray, *, bits: int = 0, tags: dict[int, int] | None = None) -> Path:
    """A grey TIFF by hand, little-endian, one strip, with the tags of its type and those given."""
    data = values.tobytes()
    kinds = {"u": 1, "i": 2, "f": 3}
    entries = {
        256: values.shape[1], 257: values.shape[0], 258: bits or 8 * values.itemsize, 259: 1, 262: 1, 273: 8, 277: 1,
        278: values.shape[0], 279: len(data), 339: kinds[values.dtype.kind], **(tags or {}),
    }  # fmt: skip
    table = b"".join(struct.pack("<HHIHH", key, 3, 1, value, 0) for key, value in sorted(entries.items()))
    path.write_bytes(
        b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(entries)) + table + b"\0" * 4
    )
    return path


def grey(path: Path) -> list[list[int]]:
    image = read_image(path)
    assert (image[0] == image[1]).all() and (image[1] == image[2]).all()
    return image[0].tolist()


def test_16_bit_counts_to_65535_and_keeps_the_high_byte(tmp_path: Path) -> None:
    deep = np.array([[0, 255, 256], [32768, 65280, 65535]], np.uint16)
    expected = [[0, 0, 1], [128, 255, 255]]
    for name in ("deep.png", "deep.tif", "deep.pgm"):
        Image.fromarray(deep).save(tmp_path / name)
        assert grey(tmp_path / name) == expected
    assert grey(tiff(tmp_path / "hand.tif", deep)) == expected
    Image.fromarray(COLOURS[..., 0].astype(np.uint16) * 257).save(tmp_path / "all.png")
    assert grey(tmp_path / "all.png") == COLOURS[..., 0].tolist()


def test_white_is_said_by_the_tags_of_a_tiff(tmp_path: Path) -> None:
    twelve = np.array([[0, 16, 4095, 2048]], np.uint16)
    assert grey(tiff(tmp_path / "a.tif", twelve, tags={281: 4095})) == [[0, 1, 255, 128]]
    # What is no power of two less 1 is the maximum of one image: another frame would be scaled otherwise.
    assert grey(tiff(tmp_path / "b.tif", twelve, tags={281: 4094})) == [[0, 0, 15, 8]]
    assert grey(tiff(tmp_path / "c.tif", twelve, tags={281: 1023})) == [[0, 0, 15, 8]]  # less than there is
    packed = np.frombuffer(bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x10]), np.uint8)[None]  # 000 800 | fff 010
    file = tiff(tmp_path / "d.tif", packed, bits=12, tags={256: 4, 339: 1})
    assert grey(file) == [[0, 128, 255, 1]]
    assert grey(tiff(tmp_path / "e.tif", np.array([[0, 65535, 32768]], np.uint16), tags={262: 0})) == [[255, 0, 127]]
    assert grey(tiff(tmp_path / "f.tif", np.array([[-3, 32767, 16384]], np.int16))) == [[0, 255, 128]]


def test_32_bit_integers_hold_8_bit_values(tmp_path: Path) -> None:
    values = np.array([[0, 7, 252], [1, 100, 255]], np.int32)
    Image.fromarray(values).save(tmp_path / "saved.tif")
    assert grey(tmp_path / "saved.tif") == values.tolist()
    for kind in (np.int32, np.uint32):
        assert grey(tiff(tmp_path / "a.tif", values.astype(kind))) == values.tolist()
        # A dark frame of the same camera stays dark.
        assert grey(tiff(tmp_path / "b.tif", (values // 50).astype(kind))) == (values // 50).tolist()
    assert grey(tiff(tmp_path / "c.tif", values * 257, tags={281: 65535})) == values.tolist()


def test_floats_count_to_1_or_255(tmp_path: Path) -> None:
    values = np.array([[0, 0.5, 1, 0.25]], np.float32)
    Image.fromarray(values).save(tmp_path / "saved.tif")
    assert grey(tmp_path / "saved.tif") == [[0, 128, 255, 64]]
    assert grey(tiff(tmp_path / "dark.tif", values / 4)) == [[0, 32, 64, 16]]
    assert grey(tiff(tmp_path / "over.tif", np.array([[-0.005, 1.2, np.nan, 1]], np.float32))) == [[0, 255, 0, 255]]
    assert grey(tiff(tmp_path / "bytes.tif", np.array([[0, 3.4, 200, 255]], np.float32))) == [[0, 3, 200, 255]]
    assert grey(tiff(tmp_path / "minus.tif", values, tags={262: 0})) == [[255, 128, 0, 191]]


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 256]], np.int32),
        np.array([[0, 2**32 - 1]], np.uint32),
        np.array([[-5, 200]], np.int32),
        np.array([[-1000, 3000]], np.int16),
        np.array([[-1, 1]], np.float32),
        np.array([[0, 4000]], np.float32),
        np.array([[0, np.inf]], np.float32),
    ],
    ids=lambda values: f"{values.dtype} {values.tolist()}",
)
def test_values_without_an_agreed_range_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"a\.tif cannot be decoded \(values .* is expected .*: save it as 8 or 16 bit"):
        read_image(tiff(tmp_path / "a.tif", values))


def test_alpha_is_dropped(tmp_path: Path) -> None:
    alpha = np.concatenate([COLOURS, np.zeros((5, 7, 1), np.uint8)], 2)
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(read_image(tmp_path / "alpha.png").permute(1, 2, 0), COLOURS)
    Image.fromarray(alpha[..., 2:], "LA").save(tmp_path / "la.png")
    assert grey(tmp_path / "la.png") == COLOURS[..., 2].tolist()


def test_cmyk_keeps_its_colours(tmp_path: Path) -> None:
    red = Image.new("RGB", (16, 16), (200, 30, 40)).convert("CMYK")
    red.save(tmp_path / "a.jpg", quality=95)
    red.save(tmp_path / "a.tif")
    content = (tmp_path / "a.jpg").read_bytes()
    assert b"Adobe" in content  # says that values are inverted
    (tmp_path / "unsaid.jpg").write_bytes(content.replace(b"Adobe", b"Other"))  # inverted all the same, as viewers hold
    expected = np.full((16, 16, 3), (200, 30, 40))
    for name in ("a.jpg", "a.tif", "unsaid.jpg"):
        np.testing.assert_allclose(read_image(tmp_path / name).permute(1, 2, 0), expected, atol=6)
