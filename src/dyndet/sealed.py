"""Files of torch that are never torn and never damaged unnoticed.

They are written beside their place and put there whole. The comment of the zip archive that a file of torch is holds a
digest of every byte before it, so that any other program reads the file as ever:

    the archive | the last two bytes of its end: the comment's length | b"dyndet-sha256:" | 64 hexadecimal digits
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import pickle
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from dyndet.disk import about_the_disk, flush_folder, part_of, sweep
from dyndet.errors import UserError, WriteError, reason

MARK = b"dyndet-sha256:"
_DIGITS = hashlib.sha256().digest_size * 2
_COMMENT = len(MARK) + _DIGITS
_END, _END_SIZE = b"PK\x05\x06", 22
_START = b"PK\x03\x04"
_BLOCK = 1 << 22
_SETTLED = 2_000_000_000  # nanoseconds: clocks of file systems are coarse
_BESIDE = 8
_again = itertools.count()


def write_sealed(content: Any, path: str | Path, *, previous: Path | None = None) -> None:
    """Writes a file of torch with a digest, all or nothing: it lies whole on the disk before it takes its place.

    Args:
        content: for `torch.save`.
        path: what was there stays until the new file has been read back.
        previous: where what was there goes then; None drops it.

    Raises:
        WriteError: if the disk does not take it. The file that was there is as it was.
    """
    path = Path(path)
    writer = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        part = part_of(path)
        try:
            writer = _write(content, part)
            if writer.error:
                raise writer.error
            if _look(part) is not None:
                raise OSError(errno.EIO, "what was written reads otherwise")
            if previous:
                _keep(path, previous)
            try:
                part.replace(path)
            except OSError:
                if previous and not path.exists():  # it was moved, not linked
                    previous.replace(path)
                raise
            flush_folder(path.parent)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
    except OSError as error:
        needed = writer.size if writer else None
        kept = f"; {path.name} is as it was before" if path.is_file() else ""
        raise WriteError(about_the_disk(error, path, needed) + kept) from error


def read_sealed(path: str | Path, *, key: str = "ckpt", mmap: bool = False) -> Any:
    """What a file of torch holds, after a look whether it is what was written. No code in it runs.

    Args:
        path: with a digest or without.
        key: what sets it, for messages.
        mmap: read tensors when they are used.

    Raises:
        UserError: if it is damaged, naming a good one beside it, or holds more than tensors and plain values.
    """
    path = Path(path)
    if (found := fault(path)) is not None:
        raise UserError(f"{path} cannot be read as a checkpoint: {found}. {_advice(path, key)}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read as a checkpoint: {reason(error)}") from error


def fault(path: Path) -> str | None:
    """What is wrong with a file of torch, in a few words, None where nothing is: by its digest, or where it has none
    (earlier files, other programs') by the checksums of its parts. What is known of a file is not looked up again.
    """
    try:
        state = path.stat()
        settled = time.time_ns() - max(state.st_ctime_ns, state.st_mtime_ns) > _SETTLED
        identity = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        return _known(path.absolute(), identity, None if settled else next(_again))
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"


class _Sealing:
    """A file for `torch.save`. It keeps the first error of the disk, which torch would make another of, and holds back
    the last two bytes, which become the comment's length.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None
        self._held = b""

    def write(self, data: memoryview | bytes) -> int:
        view = memoryview(data).cast("B")
        if len(view) < 2:
            view = memoryview(self._held + bytes(view))
        else:
            self._put(self._held)
        self._put(view[:-2])
        self._held = bytes(view[-2:])
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Torch asks for it."""

    def close(self) -> None:
        """Adds the digest and waits until everything lies on the disk."""
        self._put(_COMMENT.to_bytes(2, "little"))
        self._put(MARK)
        self._put(self.digest.hexdigest().encode())
        if self.error is None:
            try:
                self.file.flush()
                os.fsync(self.file.fileno())
            except OSError as error:
                self.error = error

    def _put(self, data: memoryview | bytes) -> None:
        self.digest.update(data)
        self.size += len(data)
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error


def _write(content: Any, part: Path) -> _Sealing:
    outer = sys.exc_info()[1]
    file = part.open("wb")
    try:
        sealing = _Sealing(file)
        torch.save(content, cast("IO[bytes]", sealing))  # it needs no more of a file
        sealing.close()
    except RuntimeError as error:  # torch's complaint about a file that an interrupt ended
        raise _first(error, outer) from None
    finally:
        with suppress(OSError):  # a buffer that the disk did not take
            file.close()
    return sealing


def _first(error: BaseException, outer: BaseException | None) -> BaseException:
    """What came before an error, up to what was there before all."""
    while error.__context__ is not None and error.__context__ is not outer:
        error = error.__context__
    return error


def _keep(path: Path, previous: Path) -> None:
    """Makes a file the previous one, if it is whole: at every moment one of them is there."""
    if not path.is_file() or fault(path) is not None:
        return
    link = part_of(previous)
    try:
        link.unlink(missing_ok=True)
        link.hardlink_to(path)
        link.replace(previous)
    except OSError:  # a file system without links
        path.replace(previous)
    finally:
        with suppress(OSError):  # POSIX: renaming a link to the same file does nothing
            link.unlink(missing_ok=True)


@lru_cache(maxsize=256)
def _known(path: Path, identity: tuple[int, ...], moment: int | None) -> str | None:
    return _look(path)


def _look(path: Path) -> str | None:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _COMMENT))
        comment = file.read()
        if comment.startswith(MARK) and len(comment) == _COMMENT:
            file.seek(0)
            good = _digest(file, size - _DIGITS).encode() == comment[-_DIGITS:]
            return None if good else "it is damaged: its digest does not fit what is in it"
        file.seek(0)
        if file.read(len(_START)) != _START:
            return "it is damaged, or no file of torch.save"
        # Without a digest an archive ends with an empty comment. Any other end is that of a damaged file.
        end = comment[-_END_SIZE:]
        if not end.startswith(_END) or end[-2:] != b"\0\0":
            return "it is damaged: its end is missing"
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(part.file_size for part in archive.infolist()) > size:  # torch compresses nothing; bombs do
                return "it is damaged: its parts are larger than itself"
            part = archive.testzip()
    except Exception:  # what a damaged archive ends in depends on the byte
        return "it is damaged: its parts are not where they were"
    return None if part is None else f"it is damaged: the checksum of {part!r} does not fit"


def _digest(file: BinaryIO, size: int) -> str:
    digest = hashlib.sha256()
    while size > 0 and (block := file.read(min(_BLOCK, size))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()


def _advice(path: Path, key: str) -> str:
    beside = next(_good_beside(path), None)
    if beside is not None:
        return f"{beside.name} beside it is good: give {key}={beside}"
    return "Copy it again from where it came; released weights of other projects go through python -m dyndet.convert"


def _good_beside(path: Path) -> Iterator[Path]:
    """Newest first."""
    others = [other for other in path.parent.glob(f"*{path.suffix or '.ckpt'}") if other.name != path.name]
    others = [other for other in others if other.is_file()]
    others.sort(key=lambda other: other.stat().st_mtime, reverse=True)
    return (other for other in others[:_BESIDE] if fault(other) is None)
