"""Files that take their place whole, and what a disk answers when it does not take them, in one line."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
CLOSED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
BROKEN = frozenset({errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT})
FAULTS = FULL | CLOSED | BROKEN

_DEAD = 3600  # seconds: a part that nobody has written to for so long
_PART = re.compile(r".+\.(?P<host>[^.]+)-(?P<process>\d+)\.part")


def about_the_disk(error: OSError, path: Path | None, needed: int | None = None) -> str:
    """What could not be written and why, what is free and needed, and what to do.

    Args:
        error: that writing ended with.
        path: of the file, or of its folder; None where neither is known.
        needed: bytes that the file takes.
    """
    why = os.strerror(error.errno) if error.errno else str(error)
    line = f"{path or 'a file of this command'} cannot be written: {why}"
    if error.errno in FULL:
        free = _free(path) if path else None
        sizes = [f"it takes {in_mb(needed)}"] if needed else []
        sizes += [f"{in_mb(free)} are free"] if free is not None else []
        known = f" ({', '.join(sizes)})" if sizes else ""
        limited = error.errno == errno.EFBIG
        return f"{line}{known}: {'raise the limit on files, ulimit -f' if limited else 'free some space where it goes'}"
    if error.errno in CLOSED:
        return f"{line}: let this user write there, or give another folder"
    return f"{line}: look after the disk or the network that it goes to"


def in_mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def part_of(path: Path) -> Path:
    """Where a file is written before it takes its place: nobody else writes there."""
    host = re.sub(r"\W", "_", socket.gethostname())[:40]
    return path.with_name(f"{path.name}.{host}-{os.getpid()}.part")


def sweep(folder: Path) -> None:
    """Removes what dead processes have left half written in a folder."""
    mine = part_of(folder / "x").name
    for part in folder.glob("*.part"):
        if (match := _PART.fullmatch(part.name)) is None:
            continue
        with suppress(OSError):
            here = mine.startswith(f"x.{match['host']}-")
            if (here and not _lives(int(match["process"]))) or time.time() - part.stat().st_mtime > _DEAD:
                part.unlink()


def flush_folder(folder: Path) -> None:
    """Makes a rename last through a power cut, where folders can be waited for."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file, all or nothing.

    Args:
        path: what was there stays until the new file is whole.
        text: goes into it, in UTF-8.

    Raises:
        OSError: with the file's name, if the disk does not take it.
    """
    part = part_of(path)
    sweep(path.parent)
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _free(path: Path) -> int | None:
    for folder in (path, *path.absolute().parents):
        if folder.is_dir():
            try:
                return shutil.disk_usage(folder).free
            except OSError:
                return None
    return None


def _lives(process: int) -> bool:
    if os.name == "nt":  # there it would be sent Ctrl-C
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
