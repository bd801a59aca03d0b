"""A fair sample of the rows on data: files, annotations, names, loader processes."""

from __future__ import annotations

import signal
import sys
from itertools import islice
from pathlib import Path

import pytest
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from faults import (
    annotations,
    hostile_names,
    image_files,
    loader_processes,
    memory_bombs,
)  # fmt: skip
from faults.row import Row

SAMPLE = {
    "R6.1": 26, "R6.2": 26, "R6.5": 24, "R7.1": 200, "R7.2": 100, "R7.3": 100, "R11.1": 2,
    "R11.2": 1, "R11.3": 1, "R16.1": 28, "R17.1": 4, "R18.1": 2,
}  # fmt: skip
ROWS = {row.id: row for module in (image_files, annotations, loader_processes, hostile_names, memory_bombs)
        for row in module.ROWS}  # fmt: skip


@pytest.mark.parametrize(("row", "count"), [(ROWS[name], count) for name, count in SAMPLE.items()], ids=list(SAMPLE))
def test_survived(row: Row, count: int, tmp_path: Path) -> None:
    outcomes = list(islice(row.inject(tmp_path), count))
    assert outcomes
    assert not [outcome for outcome in outcomes if not outcome.survived]


def test_loaders_of_torch_before_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They leave a handler of SIGCHLD, which raises wherever the main thread is when a process dies."""
    before = signal.getsignal(signal.SIGCHLD)
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    try:
        assert len(list(DataLoader(range(2), num_workers=1))) == 2  # type: ignore[arg-type]
        assert signal.getsignal(signal.SIGCHLD) != before
        test_survived(ROWS["R11.1"], 1, tmp_path)
        assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGCHLD, before)
