"""Videos: what was written comes back, frame by frame."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dyndet.data.sources import Source
from dyndet.data.video import Video, VideoWriter
from dyndet.errors import DataError

av = pytest.importorskip("av")


def grey(level: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


def video(path: Path, levels: list[int], size: tuple[int, int] = (64, 48)) -> Source:
    with VideoWriter(path, Fraction(10)) as writer:
        for level in levels:
            writer.write(grey(level, size))
    return Source(str(path), "video", path.stem)


LEVELS = [20, 60, 100, 140, 180, 220]


@pytest.mark.parametrize("step", [1, 2, 4])
def test_frames_come_back_in_order(tmp_path: Path, step: int) -> None:
    with Video(video(tmp_path / "new" / "v.mp4", LEVELS), step=step) as frames:
        assert frames.rate == Fraction(10, step) and frames.length == len(LEVELS[::step])
        seen = list(frames)
    assert [frame.number for frame in seen] == list(range(0, 6, step))
    assert [frame.seconds for frame in seen] == pytest.approx([number / 10 for number in range(0, 6, step)])
    assert all(frame.image.shape == (3, 48, 64) for frame in seen)
    assert [frame.image.float().mean().item() for frame in seen] == pytest.approx(LEVELS[::step], abs=4)


def test_odd_sides_are_filled_with_white(tmp_path: Path) -> None:
    with Video(video(tmp_path / "v.mp4", [0, 0], size=(65, 47))) as frames:
        image = next(iter(frames)).image
    assert image.shape == (3, 48, 66) and image[:, :, :60].float().mean() < 20 and image[:, 47, 65].float().mean() > 120


QUARTERS = {90: (slice(32, 64), slice(0, 24)), 180: (slice(24, 48), slice(32, 64)), -90: (slice(0, 32), slice(24, 48))}


@pytest.mark.parametrize("degrees", QUARTERS)
def test_telephones_turn_their_videos(tmp_path: Path, degrees: int) -> None:
    """Light at the top left, in a file that says it is to be turned counter-clockwise by so much."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :32] = 250
    with av.open(str(tmp_path / "turned.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV cannot write the note")
        stream.set_display_rotation(degrees)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    with Video(Source(str(tmp_path / "turned.mp4"), "video", "turned")) as frames:
        light = next(iter(frames)).image.float().mean(0) > 125
    assert light.shape == ((48, 64) if degrees == 180 else (64, 48))
    expected = light.new_zeros(light.shape)
    expected[QUARTERS[degrees]] = True
    assert (light == expected).float().mean() > 0.97


def test_files_that_are_no_videos_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    whole = Path(video(tmp_path / "whole.mp4", LEVELS).path).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    for name in ("text.mp4", "cut.mp4", "gone.mp4"):
        with pytest.raises(DataError, match=rf"video .*{name} (cannot be opened|has no pictures)"):
            Video(Source(str(tmp_path / name), "video", name))
    with pytest.raises(DataError, match="camera 77 cannot be opened"):
        Video(Source("77", "camera", "camera_77"))
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    with pytest.raises(DataError, match="only sound"):
        Video(Source(str(tmp_path / "sound.mp4"), "video", "sound"))
