"""Errors that a user can mend: the commands print them as one line and exit with a non-zero code."""

from __future__ import annotations


class UserError(ValueError):
    """What was wrong, where, and what to do."""


class DataError(UserError):
    """A dataset file, image or annotation that cannot be used."""
