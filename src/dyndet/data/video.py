"""Videos and cameras, read and written by PyAV: `pip install 'dyndet[video]'`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dyndet.data.sources import Source
from dyndet.errors import DataError, reason

USUAL_RATE = Fraction(25)
"""Frames per second where a video does not tell."""

_ENCODERS = ("libx264", "libopenh264", "mpeg4")
_CAMERAS = {"linux": ("/dev/video{}", "v4l2"), "darwin": ("{}", "avfoundation"), "win32": ("video={}", "dshow")}


class Frame(NamedTuple):
    """One picture of a video.

    Attributes:
        image: uint8 (3, H, W) RGB, upright.
        number: from 0.
        seconds: since the beginning.
    """

    image: Tensor
    number: int
    seconds: float


class Video:
    """The frames of a video file or of a camera, decoded one after the other; a context manager.

    Args:
        source: a video or a camera.
        step: takes every so many-th frame.

    Attributes:
        rate: frames per second, of those taken.
        length: how many will be taken, None where the file does not tell.

    Raises:
        DataError: if it cannot be opened, or PyAV is not installed; while frames are read, if they are damaged.
    """

    def __init__(self, source: Source, *, step: int = 1) -> None:
        self._av, self.path, self.step = _pyav(source.path), source.path, step
        try:
            if source.kind == "camera":
                name, kind = _CAMERAS.get(sys.platform, _CAMERAS["linux"])
                self._container: Any = self._av.open(name.format(source.path), format=kind)
            else:
                self._container = self._av.open(source.path)
        except (self._av.FFmpegError, OSError, ValueError) as error:
            what = "camera" if source.kind == "camera" else "video"
            raise DataError(f"{what} {source.path} cannot be opened ({_why(error)})") from error
        if not self._container.streams.video:
            self._container.close()
            raise DataError(f"video {source.path} has no pictures: it is cut off, or holds only sound")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.rate = Fraction(self._stream.average_rate or USUAL_RATE) / step
        self.length = -(-self._stream.frames // step) or None

    def __enter__(self) -> Video:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[Frame]:
        number = -1
        try:
            for number, frame in enumerate(self._container.decode(self._stream)):
                if number % self.step == 0:
                    pixels = frame.to_ndarray(format="rgb24")
                    turned = np.rot90(pixels, round(getattr(frame, "rotation", 0) / 90))  # telephones note it
                    image = torch.from_numpy(np.ascontiguousarray(turned)).permute(2, 0, 1)
                    yield Frame(image, number, float(frame.time or 0))
        except (self._av.FFmpegError, ValueError) as error:
            raise DataError(f"video {self.path} is damaged after {number + 1} frames ({_why(error)})") from error
        if number < 0:
            raise DataError(f"video {self.path} has no frames")


class VideoWriter:
    """Writes pictures of one size as an mp4; a context manager.

    Args:
        path: of the file; folders are made.
        rate: frames per second.
    """

    def __init__(self, path: str | Path, rate: Fraction) -> None:
        self._av = _pyav(str(path))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._rate = Fraction(rate).limit_denominator(1001)
        self._container: Any = self._av.open(str(path), "w", format="mp4")
        self._stream: Any = None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))
        self._container.close()

    def write(self, picture: Image.Image) -> None:
        """The next one; what the first has more in height or width stays white."""
        if self._stream is None:
            encoder = next(name for name in _ENCODERS if name in self._av.codecs_available)
            self._stream = self._container.add_stream(encoder, rate=self._rate)
            self._stream.width, self._stream.height = (side + side % 2 for side in picture.size)
            self._stream.pix_fmt = "yuv420p"
        canvas = Image.new("RGB", (self._stream.width, self._stream.height), "white")
        canvas.paste(picture, (0, 0))
        self._container.mux(self._stream.encode(self._av.VideoFrame.from_image(canvas)))


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or reason(error)


def _pyav(path: str) -> Any:
    try:
        import av
    except ImportError as error:
        raise DataError(f"{path}: videos need PyAV: pip install 'dyndet[video]'") from error
    return av
