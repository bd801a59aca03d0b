"""What a source names: files of folders, globs, lists; and the names that what is written about them gets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dyndet.data.sources import Source, _names, find_sources
from dyndet.errors import UserError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Finding needs no images that can be read."""
    root = tmp_path / "photos [1]"
    for name in ("b.jpg", "a.PNG", "notes.md", "._b.jpg", "clip.mp4", "deep/er/b.jpg", ".trash/c.jpg", "x.jpg/y.webp"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def below(root: Path, sources: list[Source]) -> list[str]:
    return [Path(source.path).relative_to(root).as_posix() for source in sources]


EVERY = ["._b.jpg", "a.PNG", "b.jpg", "clip.mp4", "deep/er/b.jpg", "x.jpg/y.webp"]


def test_a_folder_is_all_that_lies_in_it(photos: Path) -> None:
    sources = find_sources(str(photos))
    assert below(photos, sources) == EVERY
    assert [source.kind for source in sources] == ["image"] * 3 + ["video"] + ["image"] * 2
    assert [source.name for source in sources] == ["._b", "a", "b", "clip", "deep/er/b", "x.jpg/y"]


def test_what_was_written_before_is_no_source(photos: Path) -> None:
    assert "deep/er/b.jpg" not in below(photos, find_sources(str(photos), leave_out=photos / "deep"))


def test_links_to_folders_are_followed_and_circles_end(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "far.jpg").touch()
    (photos / "linked").symlink_to(tmp_path / "disk")
    (photos / "deep" / "up").symlink_to(photos)
    assert below(photos, find_sources(str(photos))) == [*EVERY[:5], "linked/far.jpg", EVERY[5]]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("photos*/*.jpg", ["b.jpg", "x.jpg"]),  # a folder, which reading reports
        ("photos*/**/*.jpg", ["b.jpg", "deep/er/b.jpg", "x.jpg"]),
        ("photos*/[ab].*", ["a.PNG", "b.jpg"]),
        ("photos [1]/b.jpg", ["b.jpg"]),  # the file itself, before the pattern
        ("photos [1]/notes.md", ["notes.md"]),  # what is named itself is tried
    ],
)
def test_globs(photos: Path, pattern: str, expected: list[str]) -> None:
    assert below(photos, find_sources(str(photos.parent / pattern))) == expected


def test_lists_and_text_files(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(photos / "b.jpg"), str(photos / "deep"), str(photos / "b.jpg"), str(photos / "gone.jpg")]
    expected = ["b.jpg", "deep/er/b.jpg", "gone.jpg"]  # each once; reading reports what is not there
    assert below(photos, find_sources(paths)) == expected
    (tmp_path / "list.txt").write_text("\ufeff\nphotos [1]/b.jpg\n\n" + "\n".join(paths) + "\n", encoding="utf-8")
    assert below(photos, find_sources(str(tmp_path / "list.txt"))) == expected
    monkeypatch.chdir(photos)
    (photos / "deep" / "list.txt").write_text("er/b.jpg\nb.jpg\n")  # beside the list, else as seen from here
    assert [Path(source.path).name for source in find_sources("deep/list.txt")] == ["b.jpg", "b.jpg"]
    monkeypatch.setenv("HOME", str(photos))
    assert find_sources("~/a.PNG")[0].path == str(photos / "a.PNG")


def test_a_number_is_a_camera_unless_it_is_a_file(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_sources(0) == find_sources("0") == [Source("0", "camera", "camera_0")]
    monkeypatch.chdir(photos)
    (photos / "7").mkdir()
    (photos / "7" / "a.jpg").touch()
    assert find_sources("7") == [Source(str(Path("7", "a.jpg")), "image", "a")]
    with pytest.raises(UserError, match="give it alone"):
        find_sources([0, "a.PNG"])


@pytest.mark.parametrize("address", ["https://example.org/a.jpg", "RTSP://camera/1", "s3://bucket/a.jpg"])
def test_addresses_are_refused(address: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{address}\n")
    for given_source in (address, [address], str(tmp_path / "list.txt")):
        with pytest.raises(UserError, match=r"addresses are not read; fetch the file first"):
            find_sources(given_source)


def test_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.txt").write_bytes(b"\xff\xfe\x00\xd8")
    for source, message in (
        (tmp_path, "no images there"),
        (tmp_path / "none.jpg", "no images"),
        ("*.none", "no images"),
    ):
        with pytest.raises(UserError, match=f"source={source}".replace("*", r"\*") + f".*{message}"):
            find_sources(str(source))
    with pytest.raises(UserError, match="no such user's folder"):
        find_sources("~nobody-of-this-name/photos")
    with pytest.raises(UserError, match="no text file with a path per line"):
        find_sources(str(tmp_path / "broken.txt"))


def test_formats_that_are_not_read_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.HEIC", "b/c.avif", "b/d.heic"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    text = r"3 files of formats that are not read \(\.avif, \.heic\): convert them to JPEG"
    with pytest.raises(UserError, match=f"no images there; {text}"):
        find_sources(str(tmp_path))
    (tmp_path / "e.jpg").touch()
    assert [source.name for source in find_sources(str(tmp_path))] == ["e"]
    assert re.search(text, caplog.text)


PARTS = st.sampled_from(["a", "A", "b", "a_jpg"])


@given(
    st.lists(st.tuples(PARTS, PARTS, st.sampled_from([".jpg", ".png", ".JPG"])), min_size=1, max_size=9, unique=True)
)
def test_no_two_outputs_share_a_name_even_where_case_does_not_count(files: list[tuple[str, str, str]]) -> None:
    names = _names([Path("/data", folder, stem + suffix) for folder, stem, suffix in files])
    assert len({name.casefold() for name in names}) == len(files)
    assert all(not Path(name).is_absolute() and ".." not in Path(name).parts for name in names)
