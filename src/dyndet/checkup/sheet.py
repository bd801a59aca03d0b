"""The doctor's page: what was found, with pictures."""

from pathlib import Path


def doctor_sheet(path: Path, splits, findings, data) -> Path:
    return path
