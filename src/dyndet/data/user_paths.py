"""Paths as users type them."""

from __future__ import annotations

from pathlib import Path

from dyndet.errors import UserError


def lies_there(path: Path) -> bool:
    """Whether there is such a file or folder; of a name that no file can have there is none."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, a link to itself, a character that no path has
        return False


def user_path(path: str | Path) -> Path:
    """With `~` for the home folder.

    Raises:
        UserError: on `~name` where there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: there is no such user's folder ({error}): write the path in full") from error
