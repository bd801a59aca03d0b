"""Paths as users type them."""

from __future__ import annotations

from pathlib import Path

from dyndet.errors import UserError


def user_path(path: str | Path) -> Path:
    """With `~` for the home folder.

    Raises:
        UserError: on `~name` where there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: there is no such user's folder ({error}): write the path in full") from error
